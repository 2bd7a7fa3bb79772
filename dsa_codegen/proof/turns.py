"""Turns: who is sampled when, so that what ran before a sample says nothing about it.

A GPU at its power limit clocks by what was drawn in the last tenth of a second. Rounds that last shorter than that leave all
contestants one clock. Where they last longer, and samples differ by who ran before, each runs untimed before its samples until
the clock is its own. Either way everybody follows everybody else equally often.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .stopwatch import Run, Stopwatch

MIN_ROUNDS = 3
FAR_BEHIND = 4.0
"""Times the fastest: whoever is slower is sampled ``MIN_ROUNDS`` times behind all others, who never follow it."""


@dataclass(frozen=True)
class Turns:
    """How contestants take turns, in milliseconds of the device.

    Attributes:
        settle_ms: what each runs untimed before a sample, where the first rounds say that it is needed; 0: never.
        timed_ms: what a sample behind that lasts; it is made of several replays where one is shorter.
        felt_ms: shorter rounds need it never.
        apart: nor do longer ones in which nobody's samples differ by more than this share.
        replay_ms: long calls are fewer in a replay, which then lasts about so long.
    """

    settle_ms: float = 0.0
    timed_ms: float = 0.0
    felt_ms: float = 0.0
    apart: float = 0.0
    replay_ms: float = math.inf


MIXED = Turns()
"""One clock for all, that of their mixture: for variants of one kernel, which draw alike."""
SETTLED = Turns(settle_ms=60.0, timed_ms=80.0, felt_ms=4.0, apart=0.015, replay_ms=20.0)
"""For contestants that draw unlike each other. On an H200 the first 40 ms are 3 % off, the next 40 less than 1 %; after that
clocks hunt by 2 % to either side within some 0.1 s, which the timed part spans."""


@dataclass
class Runner:
    """Somebody who takes turns.

    Attributes:
        run: ``reps`` calls.
        graph: whether it is a captured graph.
        replay_us: the shortest run so far, from the warm-up.
        samples: microseconds per call.
        settled: untimed runs before a sample, and the runs in it.
    """

    run: Run
    reps: int
    graph: bool
    replay_us: float = math.inf
    samples: list[float] = field(default_factory=list)
    settled: tuple[int, int] = (0, 1)

    @property
    def call_us(self) -> float:
        """Of one call, as the warm-up saw it."""
        return self.replay_us / self.reps

    @property
    def spread(self) -> float:
        """By which share of the shortest the samples differ."""
        return max(self.samples) / max(min(self.samples), 1e-9) - 1

    def settle(self, turns: Turns) -> None:
        """Forget the samples, and ask for untimed runs before each of the next."""
        self.samples.clear()
        untimed, timed = (max(1, round(1000 * each / max(self.replay_us, 1.0))) for each in (turns.settle_ms, turns.timed_ms))
        self.settled = untimed, timed

    def sample(self, stopwatch: Stopwatch) -> float:
        """Take one sample; returns the microseconds that were timed."""
        untimed, timed = self.settled
        elapsed = stopwatch.settled_us(self.run, untimed, timed)
        self.samples.append(elapsed / (timed * self.reps))
        return elapsed


def warm_up(runners: Sequence[Runner], goal_ms: float, stopwatch: Stopwatch) -> None:
    """Whole rounds that do not count, for ``goal_ms`` each on average: clocks and power settle on the mixture."""
    elapsed = 0.0
    while runners and elapsed <= goal_ms * 1000 * len(runners):
        for runner in runners:
            took = max(stopwatch.time_us(runner.run), 1.0)
            runner.replay_us = min(runner.replay_us, took)
            elapsed += took


def take(runners: Sequence[Runner], rounds: int, limit_s: float, stopwatch: Stopwatch, turns: Turns = MIXED) -> None:
    """Sample everybody in turns, after ``warm_up``.

    Args:
        rounds: samples of each, at most.
        limit_s: device seconds that are timed; ``MIN_ROUNDS`` rounds are taken however long they last.
    """
    fastest = min((runner.call_us for runner in runners), default=0.0)
    near = [runner for runner in runners if runner.call_us <= FAR_BEHIND * fastest]
    first = range(min(rounds, MIN_ROUNDS))
    spent = _rounds(near, first, stopwatch)
    if _differ(near, turns):
        for runner in near:
            runner.settle(turns)
        spent += _rounds(near, first, stopwatch)
    for number in range(MIN_ROUNDS, rounds):
        if spent > limit_s * 1e6:
            break
        spent += _rounds(near, (number,), stopwatch)
    for runner in runners:
        if runner.call_us > FAR_BEHIND * fastest:
            for _ in first:
                runner.sample(stopwatch)


def _rounds(runners: Sequence[Runner], numbers: Iterable[int], stopwatch: Stopwatch) -> float:
    return sum(runners[who].sample(stopwatch) for number in numbers for who in order(len(runners), number))


def _differ(runners: Sequence[Runner], turns: Turns) -> bool:
    """Whether the clock has time to follow whoever runs, and did."""
    felt = sum(runner.replay_us for runner in runners) >= turns.felt_ms * 1000
    return turns.settle_ms > 0 and len(runners) > 1 and felt and any(runner.spread > turns.apart for runner in runners)


def order(count: int, number: int) -> list[int]:
    """The order of round ``number``: a row of a Latin square in which each follows each other equally often.

    That takes ``count`` rounds, twice as many where it is odd (E. J. Williams, "Experimental designs balanced for the
    estimation of residual effects of treatments", 1949).
    """
    zigzag = ((place + 1) // 2 if place % 2 else -(place // 2) for place in range(count))
    row = [(who + number) % count for who in zigzag]
    return row[::-1] if count % 2 and number // count % 2 else row
