"""Jobs: what the GPU's worker process runs for the tuner: make a problem's inputs, gate and time a candidate, the final."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import backends
from ..kernels.build import Built, preload
from ..kernels.variant import Variant
from ..problem.compare import same_bits, worst
from ..problem.op import Accuracy, Outputs
from ..problem.values import Spec
from ..proof.fences import STRAY, broken, fenced
from ..proof.measure import InputSet, Measured, input_sets, measure, nbytes
from ..proof.timing import COLD, Policy, Timing
from ..proof.verify import poison, verify
from .outcome import Kind, Outcome
from .problem import Entrant, Problem
from .space import Key

DEVICE = "cuda"
PROBE = Policy(reps=5, rounds=1, warmup_ms=0.0)
EAGER = Policy(graph=False, rounds=7, warmup_ms=2.0)
_EAGER_SECONDS = 0.3  # of device time for all who are launched one by one
DOMINATED = 2.0  # a probe this many times slower than the best is not timed further
_ROUND_US = 20_000  # of device time in a round of the search: slow kernels are replayed fewer times
_KERNELS_LIMIT = 64  # modules that stay loaded: each holds device memory
# A workload whose reference is dearer than this (a second or two on a GPU) is represented by the op's small cases alone.
_REFERENCE_FLOPS = 8e12
_REFERENCE_BYTES = 4e9


@dataclass(frozen=True)
class _Prepared:
    sets: list[InputSet]
    reference: Outputs | None
    fences: list[Tensor]
    """Around the outputs of the first set."""

    @property
    def nbytes(self) -> int:
        outputs = self.reference.values() if self.reference else ()
        return sum(map(nbytes, self.sets)) + sum(tensor.numel() * tensor.element_size() for tensor in outputs)


# State of the worker's process; it dies with the worker.
_problems: OrderedDict[str, _Prepared] = OrderedDict()
_gated: dict[tuple[str, Spec, Key], Accuracy] = {}
_loaded: OrderedDict[str, Mapping[str, backends.Launchable]] = OrderedDict()


def load() -> None:
    """Import what every process of a GPU needs, before it is forked. TileLang asks for GPUs as it is imported: not that."""
    preload(("triton",))


def prepare(problem: Problem, backend: str) -> None:
    """Draw the inputs of a problem and compute its reference, unless they are still here; import the backend's compiler."""
    backends.get(backend)
    prepared_for(problem)


def evaluate(problem: Problem, entrant: Entrant, best_us: float | None) -> Outcome:
    """Gate, probe, rounds; see the constants on top. What a kernel raises is the caller's to classify."""
    gated = gate(problem, entrant)
    if not gated.ok:
        return gated
    accuracy, smem = gated.accuracy, gated.smem
    variant, sets = variant_of(problem, entrant), prepared_for(problem).sets
    (probe,) = measure([variant], sets, PROBE)
    if best_us is not None and probe.timing.median > DOMINATED * best_us:
        return Outcome(Kind.OK, probe.timing, probe.policy, accuracy, smem, dominated=True)
    reps = max(PROBE.reps, min(COLD.reps, int(_ROUND_US / max(probe.timing.median, 1.0))))
    (rounds,) = measure([variant], sets, Policy(reps=reps, rounds=5, warmup_ms=5.0))
    return Outcome(Kind.OK, rounds.timing, rounds.policy, accuracy, smem)


def gate(problem: Problem, entrant: Entrant) -> Outcome:
    """Whether the candidate is right on the operation's cases and on the workload."""
    accuracy = _gate(problem, entrant, variant_of(problem, entrant))
    smem = max(usage.smem for usage in entrant.built.resources.values())
    kind = Kind.OK if accuracy.passed else Kind.OUT_OF_BOUNDS if accuracy.stray else Kind.MISMATCH
    return Outcome(kind, accuracy=accuracy, smem=smem, detail=accuracy.detail)


def final(problem: Problem, entrants: Sequence[Entrant], limit_s: float) -> list[Measured]:
    """Time the entrants in turns, as the record will state it."""
    variants = [variant_of(problem, entrant) for entrant in entrants]
    return measure(variants, prepared_for(problem).sets, COLD, limit_s=limit_s)


def eager(problem: Problem, entrants: Sequence[Entrant]) -> list[Timing]:
    """Launch the entrants one by one, in turns: what a model without CUDA graphs sees, the host's work included."""
    variants = [variant_of(problem, entrant) for entrant in entrants]
    measured = measure(variants, prepared_for(problem).sets, EAGER, limit_s=_EAGER_SECONDS)
    return [each.timing for each in measured]


def card() -> str:
    """The name of the board: "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else ""


def recheck(problem: Problem, entrant: Entrant, repeats: int = 3) -> Accuracy:
    """The winner once more on the full workload: right, and the same bits every time where the operation promises them."""
    variant = variant_of(problem, entrant)
    accuracy, outputs = on_workload(problem, variant)
    repeatable = problem.op.repeatable(problem.spec)
    for _ in range(repeats - 1 if accuracy.passed and repeatable else 0):
        again = on_workload(problem, variant)[1]
        if not all(same_bits(outputs[name], again[name]) for name in outputs):
            return replace(accuracy, passed=False, detail="a repeat differs bitwise")
    return accuracy


def _gate(problem: Problem, entrant: Entrant, variant: Variant) -> Accuracy:
    key = (problem.op.name, problem.spec, entrant.candidate.key)
    if key not in _gated:
        results = []
        for case in problem.op.cases_for(problem.spec, entrant.config):
            results.append(verify(variant, case, DEVICE, repeats=2))
            if not results[-1].passed:
                break
        _gated[key] = worst(*results)
    if not _gated[key].passed:
        return _gated[key]
    return worst(_gated[key], on_workload(problem, variant)[0])


def on_workload(problem: Problem, variant: Variant) -> tuple[Accuracy, Outputs]:
    """Run the workload once on poisoned outputs; without a reference only the outputs are of use."""
    prepared = prepared_for(problem)
    first = prepared.sets[0]
    poison(first.outputs)
    variant.run(first.inputs, first.outputs)
    outputs = {name: tensor.clone() for name, tensor in first.outputs.items()}
    if broken(prepared.fences):
        return STRAY, outputs
    if prepared.reference is None:
        return Accuracy(True, 0.0, 0.0), outputs
    return problem.op.check(problem.spec, first.inputs, outputs, prepared.reference), outputs


def prepared_for(problem: Problem) -> _Prepared:
    """The problem's inputs and reference, drawn unless they are still here."""
    if problem.id not in _problems:
        first, *others = input_sets(problem.op, problem.spec, problem.case, problem.gpu, DEVICE)
        outputs, fences = fenced(first.outputs, first.inputs)
        first = replace(first, outputs=outputs)
        _problems[problem.id] = _Prepared([first, *others], _reference(problem, first), fences)
        _evict()
    _problems.move_to_end(problem.id)
    return _problems[problem.id]


def _reference(problem: Problem, first: InputSet) -> Outputs | None:
    cost = problem.op.cost(problem.spec, problem.case)
    if cost.flops > _REFERENCE_FLOPS or cost.bytes > _REFERENCE_BYTES:
        return None
    poison(first.outputs)  # an operation that writes into an argument finds there what a candidate will find
    return problem.op.reference(problem.spec, first.inputs)


def _evict() -> None:
    """Drop the problems used longest ago until the others leave half of the device's memory free."""
    limit = _memory() / 2
    while len(_problems) > 1 and sum(prepared.nbytes for prepared in _problems.values()) > limit:
        _problems.popitem(last=False)


def _memory() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def variant_of(problem: Problem, entrant: Entrant) -> Variant:
    """The candidate's kernels, loaded."""
    return Variant(problem.op, problem.spec, entrant.config, problem.gpu, _kernels(entrant.built))


def _kernels(built: Built) -> Mapping[str, backends.Launchable]:
    sha = built.rendered.sha
    if sha not in _loaded:
        _loaded[sha] = built.load()
        while len(_loaded) > _KERNELS_LIMIT:
            _loaded.popitem(last=False)
    return _loaded[sha]
