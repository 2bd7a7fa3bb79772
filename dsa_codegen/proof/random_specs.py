"""Random specs of the whole space that operations allow: what property tests render, compile, interpret and run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from .. import ops
from ..errors import NoConfig, UnknownName
from ..gpu import Gpu
from ..kernels.build import build
from ..kernels.render import render
from ..kernels.variant import Variant
from ..problem.op import Config, Op
from ..problem.values import Spec
from .random_fields import DRAWN
from .verify import verify

_NATIVE = 0.7
"""Of the draws for a template for Hopper those of the shapes that models have most; of any shape it serves few."""


def drawn(op: Op, draw: random.Random, native: bool = False) -> Spec:
    """A random spec; ``native`` ones have shapes that the templates for Hopper take."""
    return op.spec_type.from_dict(DRAWN[op.name](draw, native))


def served(op: Op, backend: str, draw: random.Random, gpu: Gpu) -> tuple[Spec, Config]:
    """A random spec that the backend serves, with the config that it is served by."""
    while True:
        spec = drawn(op, draw, backend != "triton" and draw.random() < _NATIVE)
        try:
            return spec, op.default_config(spec, op.workloads(spec)[0].sizes, gpu, backend)
        except NoConfig:
            if backend == "triton" and not spec.to_dict().get("batch_invariant"):  # one order of summation is one backend's
                raise


def configured(op: Op, spec: Spec, default: Config, draw: random.Random, gpu: Gpu) -> Config:
    """Any config of the default's backend that breaks no constraint; the default where a thousand drawn ones do."""
    ranges = {parameter.name: parameter.choices for parameter in op.parameters(default.backend)}
    for _ in range(1000):
        config = Config.of(default.backend, **{name: draw.choice(choices) for name, choices in ranges.items()})
        if not op.violations(spec, config, gpu):
            return config
    return default


def sample(
    count: int, seed: int, gpu: Gpu, backend: str = "triton", only: str | None = None, any_config: bool = False
) -> Iterator[tuple[Op, Spec, Config]]:
    """So many random specs, in turn of every operation that has a template of the backend, or of the one named.

    Each comes with its default config, or with any that it can have.

    Raises:
        UnknownName: ``only`` names no operation whose specs are drawn.
    """
    if only is not None and only not in DRAWN:
        raise UnknownName("operation of random specs", only, DRAWN)
    draw = random.Random(seed)
    able = [ops.get(name) for name in DRAWN if backend in ops.get(name).backends and name == (only or name)]
    for number in range(count if able else 0):
        op = able[number % len(able)]
        spec, config = served(op, backend, draw, gpu)
        yield op, spec, configured(op, spec, config, draw, gpu) if any_config else config


def prove(op_name: str, spec: Spec, config: Config, gpu: Gpu, repeats: int = 3) -> tuple[int, str]:
    """Run the small cases and one long one on the current GPU: (cases, what was wrong); a job for a ``Worker``."""
    op = ops.get(op_name)
    cases = [op.within_reach(spec, config, case) for case in (*op.cases(spec), *op.long_cases(spec)[:1])]
    variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load())
    for case in cases:
        accuracy = verify(variant, case, "cuda", repeats=repeats)
        if not accuracy.passed:
            return len(cases), f"{case.id}: {accuracy.detail}"
    return len(cases), ""


def checked(op_name: str, spec: Spec, config: Config, gpu: Gpu, run: bool) -> dict[str, Any]:
    """Build a spec and hold its resources against their limits; where it is to run, ``prove`` it; a job for a ``Worker``."""
    start = time.monotonic()
    used = build(render(ops.get(op_name), spec, config), gpu).resources.values()
    smem, spills = max(usage.smem for usage in used), max(usage.spills for usage in used)
    cases, wrong = 0, f"{smem} bytes of shared memory, {gpu.smem_per_block} allowed" if smem > gpu.smem_per_block else ""
    if run and not wrong:
        cases, wrong = prove(op_name, spec, config, gpu)
    seconds = round(time.monotonic() - start, 2)
    return {"spills": spills, "smem": smem, "cases": cases, "wrong": wrong, "seconds": seconds}


def small(spec: Spec) -> Spec:
    """The same with fewer tokens, for the interpreter."""
    fields = spec.to_dict()
    shorter = {"topk": min(int(fields["topk"]), 70)} if "topk" in fields else {}
    return type(spec).from_dict({**fields, **shorter})
