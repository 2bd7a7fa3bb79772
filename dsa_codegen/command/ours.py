"""Time this package's own kernels, as the dispatcher would choose them, against the roofline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..gpu import Gpu
from ..kernels.build import build
from ..kernels.render import render
from ..kernels.variant import Variant
from ..ops.needs import Need, specs
from ..problem.op import Case, Op
from ..problem.presets import Model
from ..problem.values import Spec
from ..proof.measure import input_sets, measure
from ..proof.timing import COLD, Policy, Timing
from ..records.lookup import Found
from ..runtime import dispatch


@dataclass(frozen=True)
class Row:
    """One case, timed."""

    need: Need
    found: Found
    timing: Timing
    limit_us: float

    @property
    def share_of_limit(self) -> float:
        """The roofline's time over the measured one; 1 is the roof."""
        return self.limit_us / self.timing.median

    @property
    def tflops(self) -> float:
        """Operations of the problem (never padded work) per time."""
        return self.need.op.cost(self.need.spec, self.need.case).flops / self.timing.median / 1e6

    @property
    def terabytes_per_s(self) -> float:
        """Least bytes of the problem per time."""
        return self.need.op.cost(self.need.spec, self.need.case).bytes / self.timing.median / 1e6


def plan(model: Model, gpu: Gpu, names: Sequence[str] = ()) -> list[Need]:
    """The cases of a benchmark run: every workload of every operation of the model."""
    return [Need(op, spec, case) for op, spec in specs(model, names, gpu) for case in op.workloads(spec)]


def run(cases: Sequence[Need], gpu: Gpu, policy: Policy = COLD) -> Iterator[Row]:
    """Time the cases one after another on the current device."""
    for need in cases:
        yield time_case(need.op, need.spec, need.case, gpu, policy)


def time_case(op: Op, spec: Spec, case: Case, gpu: Gpu, policy: Policy) -> Row:
    """Time the variant that the dispatcher would use for the case."""
    found = dispatch.chosen(op, spec, case.sizes, gpu)
    variant = Variant(op, spec, found.config, gpu, build(render(op, spec, found.config), gpu).load())
    (measured,) = measure([variant], input_sets(op, spec, case, gpu), policy)
    return Row(Need(op, spec, case), found, measured.timing, op.cost(spec, case).limit_us(gpu))
