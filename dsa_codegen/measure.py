"""Measure: microseconds per call of several variants that take turns, in the way that serving runs them.

A sample is one replay of a CUDA graph of at least 20 calls, divided by its calls. Cold: the calls rotate over input sets that
together exceed twice the L2, so that no call finds its inputs there from the call before; warm: one set again and again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .draw import Draw
from .gpu import Gpu
from .op import Case, Inputs, Op, Outputs
from .stopwatch import CudaStopwatch, Run, Stopwatch
from .timing import COLD, Policy, Timing
from .values import Spec
from .variant import Variant

MEMORY_LIMIT = 8 << 30  # bytes of input sets with their outputs
SETS_LIMIT = 256  # a problem that is smaller than L2 / 128 stays in L2 however it is served
DISTINCT = 4  # sets drawn anew; the others are copies of them, which cost a tenth of the time to make
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class InputSet:
    """The inputs of one call and the outputs that it writes."""

    inputs: Inputs
    outputs: Outputs


@dataclass(frozen=True)
class Measured:
    """The time of one variant, and how it was taken: ``policy`` states what was done, not what was asked for."""

    timing: Timing
    policy: Policy
    sets: int


def measure(
    variants: Sequence[Variant],
    sets: Sequence[InputSet],
    policy: Policy = COLD,
    stopwatch: Stopwatch | None = None,
    limit_s: float = math.inf,
) -> list[Measured]:
    """Time variants of one problem on the current device, interleaved round by round.

    Args:
        variants: what to time; all of one operation and spec.
        sets: the input sets to rotate over, from ``input_sets``; a warm policy reads the first only.
        limit_s: device seconds for the samples of all variants; at least 3 rounds are taken.
    """
    stopwatch = stopwatch or CudaStopwatch()
    sets = sets if policy.cold_l2 else sets[:1]
    reps = max(policy.reps, len(sets))
    runs = [_prepare(variant, sets, reps, policy, stopwatch) for variant in variants]
    for run, _ in runs:
        _warm_up(run, policy, stopwatch)
    samples: list[list[float]] = [[] for _ in runs]
    spent = 0.0
    for number in range(policy.rounds):
        if number >= _MIN_ROUNDS and spent > limit_s:
            break
        for (run, _), taken in zip(runs, samples, strict=True):
            elapsed = stopwatch.time_us(run)
            taken.append(elapsed / reps)
            spent += elapsed / 1e6
    cold = policy.cold_l2 and _exceeds_l2(sets, variants[0].gpu) if variants else False
    return [
        Measured(Timing.of(taken), replace(policy, graph=graph, cold_l2=cold, reps=reps, rounds=len(taken)), len(sets))
        for (_, graph), taken in zip(runs, samples, strict=True)
    ]


def _prepare(variant: Variant, sets: Sequence[InputSet], reps: int, policy: Policy, stopwatch: Stopwatch) -> tuple[Run, bool]:
    """Something that runs ``reps`` calls, and whether it is a graph."""
    calls = [_call(variant, sets[number % len(sets)]) for number in range(reps)]
    graph = stopwatch.capture(calls) if policy.graph else None

    def plainly() -> None:
        for call in calls:
            call()

    return graph or plainly, graph is not None


def _call(variant: Variant, each: InputSet) -> Run:
    def call() -> None:
        variant.run(each.inputs, each.outputs)

    return call


def _warm_up(run: Run, policy: Policy, stopwatch: Stopwatch) -> None:
    elapsed = stopwatch.time_us(run)
    while elapsed < policy.warmup_ms * 1000:
        elapsed += max(stopwatch.time_us(run), 1.0)


def input_sets(op: Op, spec: Spec, case: Case, gpu: Gpu, device: str = "cuda", seed: int = 0) -> list[InputSet]:
    """As many input sets as it takes to exceed twice the L2, within 8 GB and at least one; outputs are allocated."""
    first = _set(op, spec, op.inputs(spec, case, Draw(seed, device)))
    size = max(nbytes(first), 1)
    count = max(1, min(math.ceil(2 * gpu.l2 / size), MEMORY_LIMIT // size, SETS_LIMIT))
    drawn = [first]
    for number in range(1, min(count, DISTINCT)):
        drawn.append(_set(op, spec, op.inputs(spec, case, Draw(seed + number, device))))
    copies = [_set(op, spec, _copy(drawn[number % len(drawn)].inputs)) for number in range(len(drawn), count)]
    return [*drawn, *copies]


def _set(op: Op, spec: Spec, inputs: Inputs) -> InputSet:
    return InputSet(inputs, op.allocate(spec, inputs))


def nbytes(each: InputSet) -> int:
    """Bytes of a set's tensors; one that is input and output counts once."""
    tensors = {id(value): value for value in (*each.inputs.values(), *each.outputs.values()) if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _exceeds_l2(sets: Sequence[InputSet], gpu: Gpu) -> bool:
    return sum(map(nbytes, sets)) > gpu.l2


def _copy(inputs: Inputs) -> Inputs:
    return {name: _clone(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _clone(tensor: Tensor) -> Tensor:
    """A copy with the same strides (``clone`` closes the gaps between padded rows)."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
