"""Measure: microseconds per call of several variants that take turns, in the way that serving runs them.

A sample is one replay of a CUDA graph of at least 20 calls (of fewer where few last long), divided by its calls. Cold: the
calls rotate over input sets that together touch more than twice the L2, so that no call finds its inputs there; warm: one set
again and again. ``turns`` says in which order samples are taken, and what runs before them.
"""

from __future__ import annotations

import math
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
from .turns import MIXED, Runner, Turns, take, warm_up

MEMORY_LIMIT = 8 << 30  # bytes of input sets with their outputs
SETS_LIMIT = 256  # a problem that is smaller than L2 / 128 stays in L2 however it is served
DISTINCT = 4  # sets drawn anew; the others are copies of them, which cost a tenth of the time to make
_LEAST_CALLS = 4  # of a replay, however long they last


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
    settled: bool = False
    """Whether each sample came behind untimed calls of its own."""


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
    turns: Turns = MIXED,
) -> list[Measured]:
    """As ``measure``, of anything that can be called: for each contestant one call per input set.

    Args:
        cold: whether the sets together exceed the L2; what fits there must not be called cold.
        turns: how the contestants take turns.
    """
    stopwatch = stopwatch or CudaStopwatch()
    contestants = contestants if policy.cold_l2 else [calls[:1] for calls in contestants]
    sets = max((len(calls) for calls in contestants), default=0)
    runners = [_prepare(calls, _reps(calls, sets, policy, stopwatch, turns), policy, stopwatch) for calls in contestants]
    warm_up(runners, policy.warmup_ms, stopwatch)
    take(runners, policy.rounds, limit_s, stopwatch, turns)
    return [_measured(runner, policy, sets, cold and policy.cold_l2) for runner in runners]


def _reps(calls: Sequence[Run], sets: int, policy: Policy, stopwatch: Stopwatch, turns: Turns) -> int:
    """Calls in a replay: every set is in it, and long calls are few."""
    if math.isinf(turns.replay_ms) or sets >= policy.reps:
        return max(policy.reps, sets)
    call_us = max(min(stopwatch.time_us(calls[0]) for _ in range(2)), 1.0)  # what is loaded at the first is there at the second
    return max(sets, min(policy.reps, max(_LEAST_CALLS, math.ceil(turns.replay_ms * 1000 / call_us))))


def _measured(runner: Runner, policy: Policy, sets: int, cold: bool) -> Measured:
    untimed, timed = runner.settled
    done = replace(policy, graph=runner.graph, cold_l2=cold, reps=runner.reps * timed, rounds=len(runner.samples))
    return Measured(Timing.of(runner.samples), done, sets, untimed > 0)


def _prepare(each: Sequence[Run], reps: int, policy: Policy, stopwatch: Stopwatch) -> Runner:
    calls = [each[number % len(each)] for number in range(reps)]
    graph = stopwatch.capture(calls) if policy.graph else None

    def plainly() -> None:
        for call in calls:
            call()

    return Runner(graph or plainly, reps, graph is not None)


def _call(variant: Variant, each: InputSet) -> Run:
    def call() -> None:
        variant.run(each.inputs, each.outputs)

    return call


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
