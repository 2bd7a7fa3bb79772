"""Measure: microseconds per call of several variants that take turns, in the way that serving runs them.

A sample is one replay of a CUDA graph of at least 20 calls, divided by its calls. Cold: the calls rotate over input sets that
together touch more than twice the L2, so that no call finds its inputs there; warm: one set again and again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gpu import Gpu
from ..kernels.variant import Variant
from ..problem.draw import Draw
from ..problem.op import Case, Inputs, Op, Outputs
from ..problem.values import Spec
from .stopwatch import CudaStopwatch, Run, Stopwatch
from .timing import COLD, Policy, Timing

MEMORY_LIMIT = 8 << 30  # bytes of input sets with their outputs
SETS_LIMIT = 256  # a problem that is smaller than L2 / 128 stays in L2 however it is served
DISTINCT = 4  # sets drawn anew; the others are copies of them, which cost a tenth of the time to make
_MIN_ROUNDS = 3
_FAR_BEHIND = 4.0  # times the fastest: whoever is slower rests after _MIN_ROUNDS and costs the others no rounds


@dataclass(frozen=True)
class InputSet:
    """The inputs of one call and the outputs that it writes."""

    inputs: Inputs
    outputs: Outputs
    moved: int | None = None
    """Bytes that a call moves, where it reads little of what is there (a cache through indices); None: all of it."""


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
        limit_s: device seconds for the samples of all variants; at least 3 rounds are taken, and no more of those that are
            far behind the fastest.
    """
    cold = bool(variants) and _exceeds_l2(sets, variants[0].gpu)
    contestants = [[_call(variant, each) for each in sets] for variant in variants]
    return measure_calls(contestants, policy, stopwatch, limit_s, cold=cold)


def measure_calls(
    contestants: Sequence[Sequence[Run]],
    policy: Policy = COLD,
    stopwatch: Stopwatch | None = None,
    limit_s: float = math.inf,
    cold: bool = True,
) -> list[Measured]:
    """As ``measure``, of anything that can be called: for each contestant one call per input set.

    Args:
        cold: whether the sets together exceed the L2; what fits there must not be called cold.
    """
    stopwatch = stopwatch or CudaStopwatch()
    contestants = contestants if policy.cold_l2 else [calls[:1] for calls in contestants]
    sets = max((len(calls) for calls in contestants), default=0)
    reps = max(policy.reps, sets)
    runs = [_prepare(calls, reps, policy, stopwatch) for calls in contestants]
    replays = [run for run, _ in runs]
    _warm_up(replays, policy, stopwatch)
    samples = _take_turns(replays, policy.rounds, limit_s, stopwatch)
    cold = cold and policy.cold_l2
    return [
        Measured(
            Timing.of([elapsed / reps for elapsed in taken]),
            replace(policy, graph=graph, cold_l2=cold, reps=reps, rounds=len(taken)),
            sets,
        )
        for (_, graph), taken in zip(runs, samples, strict=True)
    ]


def _prepare(each: Sequence[Run], reps: int, policy: Policy, stopwatch: Stopwatch) -> tuple[Run, bool]:
    """Something that runs ``reps`` calls, and whether it is a graph."""
    calls = [each[number % len(each)] for number in range(reps)]
    graph = stopwatch.capture(calls) if policy.graph else None

    def plainly() -> None:
        for call in calls:
            call()

    return graph or plainly, graph is not None


def _call(variant: Variant, each: InputSet) -> Run:
    def call() -> None:
        variant.run(each.inputs, each.outputs)

    return call


def _warm_up(runs: Sequence[Run], policy: Policy, stopwatch: Stopwatch) -> None:
    """Whole rounds that do not count: clocks and power settle on the very mix that is timed afterwards."""
    goal, elapsed = policy.warmup_ms * 1000 * len(runs), 0.0
    while runs and elapsed <= goal:
        elapsed += sum(max(stopwatch.time_us(run), 1.0) for run in runs)


def _take_turns(runs: Sequence[Run], rounds: int, limit_s: float, stopwatch: Stopwatch) -> list[list[float]]:
    """Samples of each run in microseconds. Every other round goes backwards: nobody always has the same predecessor."""
    samples: list[list[float]] = [[] for _ in runs]
    racing = list(range(len(runs)))
    spent = 0.0
    for number in range(rounds):
        if number == _MIN_ROUNDS:
            medians = [statistics.median(taken) for taken in samples]
            racing = [who for who in racing if medians[who] <= _FAR_BEHIND * min(medians)]
            spent = sum(sum(samples[who]) for who in racing)
        if number >= _MIN_ROUNDS and spent > limit_s * 1e6:
            break
        for who in racing if number % 2 == 0 else reversed(racing):
            elapsed = stopwatch.time_us(runs[who])
            samples[who].append(elapsed)
            spent += elapsed
    return samples


def input_sets(op: Op, spec: Spec, case: Case, gpu: Gpu, device: str = "cuda", seed: int = 0) -> list[InputSet]:
    """As many input sets as it takes to touch twice the L2, within 8 GB and at least one; outputs are allocated."""
    moved = int(op.cost(spec, case).bytes)

    def draw(number: int) -> Inputs:
        return op.inputs(spec, case, Draw(seed + number, device))

    inputs = draw(0)
    first = InputSet(inputs, op.allocate(spec, inputs), moved)
    drawn = rotation(draw, inputs, nbytes(first), moved, gpu)
    return [first, *(InputSet(inputs, op.allocate(spec, inputs), moved) for inputs in drawn[1:])]


def rotation(draw: Callable[[int], Inputs], first: Inputs, size: int, moved: int, gpu: Gpu) -> list[Inputs]:
    """``first`` and as many further inputs as it takes for their calls to touch twice the L2.

    Args:
        draw: fresh inputs by number.
        size: bytes of a set with its outputs, of which a call moves ``moved``; 8 GB of sets are never exceeded.
    """
    size = max(size, 1)
    count = max(1, min(math.ceil(2 * gpu.l2 / max(1, min(moved, size))), MEMORY_LIMIT // size, SETS_LIMIT))
    drawn = [first, *(draw(number) for number in range(1, min(count, DISTINCT)))]
    return [*drawn, *(_copy(drawn[number % len(drawn)]) for number in range(len(drawn), count))]


def nbytes(each: InputSet) -> int:
    """Bytes of a set's tensors; one that is input and output counts once."""
    tensors = {id(value): value for value in (*each.inputs.values(), *each.outputs.values()) if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def touched(each: InputSet) -> int:
    """Bytes of a set that a call moves."""
    return nbytes(each) if each.moved is None else min(each.moved, nbytes(each))


def _exceeds_l2(sets: Sequence[InputSet], gpu: Gpu) -> bool:
    return sum(map(touched, sets)) > gpu.l2


def _copy(inputs: Inputs) -> Inputs:
    return {name: _clone(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _clone(tensor: Tensor) -> Tensor:
    """A copy with the same strides (``clone`` closes the gaps between padded rows)."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
