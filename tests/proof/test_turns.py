"""Turns on a device whose clock follows what has run: nobody's time says who was there before."""

from __future__ import annotations

import collections
import itertools
import math

import pytest

from dsa_codegen.proof.measure import measure_calls
from dsa_codegen.proof.stopwatch import Stopwatch
from dsa_codegen.proof.timing import Policy
from dsa_codegen.proof.turns import MIXED, SETTLED, Turns, order

POLICY = Policy(reps=20, rounds=12, warmup_ms=0)
_FOLLOWS_US = 20e3


class Device(Stopwatch):
    """A device at its power limit: its clock goes to one over what a call draws, as fast as a power limiter's does."""

    def __init__(self) -> None:
        self.now, self.clock = 0.0, 1.0
        self.log: list[str] = []

    def call(self, name: str, work_us: float, draw: float):
        """A call that takes ``work_us`` at a clock of 1."""

        def run():
            took = work_us / self.clock
            self.now += took
            self.clock += (1 / draw - self.clock) * (1 - math.exp(-took / _FOLLOWS_US))
            self.log.append(name)

        return [run]

    def capture(self, calls):
        return lambda: [call() for call in calls]

    def time_us(self, run):
        before = self.now
        run()
        return self.now - before


def timed(device, calls, turns, policy=POLICY, limit_s=math.inf):
    return measure_calls(calls, policy, device, limit_s, turns=turns)


def hot_and_twins(device, scale=1.0):
    """What draws much, and one kernel twice."""
    return [device.call(*each) for each in (("hot", 5000 * scale, 1.4), ("a", 4000 * scale, 1.1), ("b", 4000 * scale, 1.1))]


def test_settled_times_are_those_of_each_alone():
    device = Device()
    hot, one, two = timed(device, hot_and_twins(device), SETTLED)
    assert hot.settled and one.settled and two.settled
    assert hot.timing.median == pytest.approx(7000, rel=0.01)
    assert one.timing.median == pytest.approx(4400, rel=0.01)
    assert one.timing.median / two.timing.median == pytest.approx(1, abs=0.003)
    assert max(each.timing.p80 / each.timing.p20 for each in (hot, one, two)) < 1.01


def test_without_settling_long_samples_say_who_ran_before():
    device = Device()
    _, one, _ = timed(device, hot_and_twins(device), MIXED)
    assert not one.settled
    assert one.timing.p80 / one.timing.p20 > 1.02


def test_short_rounds_share_one_clock_and_cost_nothing_more():
    device = Device()
    _, one, two = timed(device, hot_and_twins(device, scale=1e-2), SETTLED, Policy(reps=20, rounds=12, warmup_ms=50))
    assert not one.settled
    assert one.timing.median / two.timing.median == pytest.approx(1, abs=0.003)
    device = Device()
    timed(device, hot_and_twins(device, scale=1e-2), SETTLED)
    probes, warm_up = 2 * 3, 20 * 3
    assert len(device.log) == probes + warm_up + 20 * 3 * POLICY.rounds


def test_nobody_follows_who_is_far_behind():
    device = Device()
    calls = [device.call("slow", 90.0, 1.4), device.call("a", 10.0, 1.1), device.call("b", 11.0, 1.1)]
    slow, one, two = timed(device, calls, MIXED)
    assert (slow.timing.n, one.timing.n, two.timing.n) == (3, POLICY.rounds, POLICY.rounds)
    turns = [name for name, _ in itertools.groupby(device.log)]
    assert turns.count("slow") == 2, "once in the warm-up, and once behind all others"
    assert device.log[-3 * POLICY.reps :] == ["slow"] * 3 * POLICY.reps


def test_samples_that_agree_need_no_settling():
    """Long rounds on a device that is at no limit."""
    device = Device()
    one, two = timed(device, [device.call(name, 4000.0, 1.0) for name in "ab"], SETTLED)
    assert not one.settled and (one.timing.n, two.timing.n) == (POLICY.rounds, POLICY.rounds)
    assert len(device.log) == 2 * (2 + 5 + 5 * POLICY.rounds)


def test_only_what_is_timed_counts_towards_the_limit():
    """Three first rounds of 0.07 s and settled ones of 0.23 s, each behind 0.2 s of untimed calls."""
    device = Device()
    for limit_s, rounds in ((0.5, 3), (1.0, 4), (2.0, 9)):
        _, one, _ = timed(device, hot_and_twins(device), SETTLED, limit_s=limit_s)
        assert one.settled and one.timing.n == rounds


def test_one_alone_needs_no_settling():
    device = Device()
    (alone,) = timed(device, [device.call("a", 4000.0, 1.1)], SETTLED)
    assert not alone.settled


@pytest.mark.parametrize(
    ("call_us", "sets", "reps"), [(100, 1, 20), (2500, 1, 8), (50_000, 1, 4), (2500, 12, 12), (2500, 30, 30)]
)
def test_long_calls_are_few_in_a_replay(call_us, sets, reps):
    device = Device()
    calls = device.call("a", call_us, 1.0) * sets
    (measured,) = timed(device, [calls], SETTLED)
    assert measured.policy.reps == reps
    assert timed(device, [calls], MIXED)[0].policy.reps == max(20, sets)


def test_a_settled_sample_of_short_replays_is_made_of_several():
    device = Device()
    turns = Turns(settle_ms=50.0, timed_ms=20.0)
    one, _ = timed(device, [device.call(name, 100.0, 1.0001) for name in "ab"], turns)
    assert one.settled and one.policy.reps == 20 * 10
    assert one.timing.median == pytest.approx(100.0, rel=1e-3)
    untimed, timed_ = 25 * 20, 10 * 20
    assert [(name, len(list(calls))) for name, calls in itertools.groupby(device.log)][-1] == ("a", untimed + timed_)


@pytest.mark.parametrize("count", range(1, 9))
def test_everybody_follows_everybody_equally_often(count):
    rounds = [order(count, number) for number in range(2 * count)]
    assert all(sorted(each) == list(range(count)) for each in rounds)
    follows = collections.Counter(pair for each in rounds for pair in itertools.pairwise(each))
    assert follows == dict.fromkeys(itertools.permutations(range(count), 2), 2)
    places = collections.Counter((place, who) for each in rounds for place, who in enumerate(each))
    assert set(places.values()) == {2}
