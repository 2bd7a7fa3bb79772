"""Measuring on a fake clock: what is replayed in which order, what is summarised, how memory is bounded."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof import measure as room
from dsa_codegen.proof.measure import InputSet, input_sets, measure, nbytes, touched
from dsa_codegen.proof.stopwatch import CudaStopwatch, Stopwatch
from dsa_codegen.proof.timing import COLD, WARM, Policy, Timing

from support import H200

SPEC = IndexerSpec(8, 64)
CASE = Case(IndexerSizes(16, 64), "causal")
CONFIG = Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=1)
SMALL_L2 = dataclasses.replace(H200, l2=40_000)
QUICK = Policy(reps=4, rounds=3, warmup_ms=0)


class FakeClock(Stopwatch):
    """Time passes only where a fake kernel says so."""

    def __init__(self, capturable: bool = True) -> None:
        self.now = 0.0
        self.capturable = capturable
        self.log: list[tuple[str, int]] = []

    def capture(self, calls):
        if not self.capturable:
            return None
        return lambda: [call() for call in calls]

    def time_us(self, run):
        before = self.now
        run()
        return self.now - before

    def variant(self, name: str, *times_us: float) -> Variant:
        """A variant whose kernel takes the given times in turn and logs the address of its first input."""
        turn = iter(range(10**9))

        def kernel(grid, args):
            self.now += times_us[next(turn) % len(times_us)]
            self.log.append((name, args[0].data_ptr()))

        return Variant(OP, SPEC, CONFIG, SMALL_L2, {"indexer": kernel})


@pytest.fixture(scope="module")
def sets() -> list[InputSet]:
    return input_sets(OP, SPEC, CASE, SMALL_L2, device="cpu")


def test_a_sample_is_a_replay_divided_by_its_calls(sets):
    clock = FakeClock()
    (measured,) = measure([clock.variant("a", 7.0)], sets, QUICK, clock)
    assert measured.timing == Timing(7.0, 7.0, 7.0, 3)
    assert (measured.policy.graph, measured.policy.cold_l2, measured.policy.rounds) == (True, True, 3)


def test_variants_take_turns(sets):
    clock = FakeClock()
    fast, slow = measure([clock.variant("a", 1.0), clock.variant("b", 2.0)], sets, QUICK, clock)
    assert (fast.timing.median, slow.timing.median) == (1.0, 2.0)
    names = [name for name, _ in clock.log]
    turns = names[:: fast.policy.reps]
    assert turns == ["a", "b", "a", "b", "b", "a", "a", "b"], "the first turn is the warm-up, every other goes back"


def test_clocks_that_fall_cost_both_the_same(sets):
    """A device that slows down all the time, as one does that gets hot: the ratio of two equal variants stays 1."""
    clock = FakeClock()

    def slower_and_slower(name):
        def kernel(grid, args):
            clock.now += 10.0 + clock.now / 100

        return dataclasses.replace(clock.variant(name), kernels={"indexer": kernel})

    policy = dataclasses.replace(QUICK, rounds=8)
    one, two = measure([slower_and_slower("a"), slower_and_slower("b")], sets, policy, clock)
    assert one.timing.median / two.timing.median == pytest.approx(1.0, abs=0.01)


def test_the_slow_rest_after_three_rounds(sets):
    clock = FakeClock()
    policy = dataclasses.replace(QUICK, rounds=20)
    fast, near, slow = measure([clock.variant(name, us) for name, us in (("a", 1), ("b", 3), ("c", 50))], sets, policy, clock)
    assert (fast.timing.n, near.timing.n, slow.timing.n) == (20, 20, 3)
    assert slow.timing.median == 50.0


def test_the_slow_do_not_use_up_the_limit_of_the_fast(sets):
    clock = FakeClock()
    policy = dataclasses.replace(QUICK, rounds=20)
    fast, slow = measure([clock.variant("a", 100.0), clock.variant("b", 1e6)], sets, policy, clock, limit_s=1.0)
    assert (fast.timing.n, slow.timing.n) == (20, 3)


def test_cold_rotates_and_warm_repeats(sets):
    clock = FakeClock()
    (cold,) = measure([clock.variant("a", 1.0)], sets, QUICK, clock)
    addresses = [address for _, address in clock.log]
    assert len(set(addresses)) == len(sets) == cold.sets > 1
    assert all(one != two for one, two in itertools.pairwise(addresses))
    clock.log.clear()
    (warm,) = measure([clock.variant("a", 1.0)], sets, dataclasses.replace(QUICK, cold_l2=False), clock)
    assert len({address for _, address in clock.log}) == warm.sets == 1
    assert not warm.policy.cold_l2


def test_every_set_is_used_in_one_replay(sets):
    clock = FakeClock()
    (measured,) = measure([clock.variant("a", 1.0)], sets, dataclasses.replace(QUICK, reps=1), clock)
    assert measured.policy.reps == len(sets)


def test_plain_launches_where_capture_fails(sets):
    clock = FakeClock(capturable=False)
    (measured,) = measure([clock.variant("a", 3.0)], sets, QUICK, clock)
    assert measured.timing.median == 3.0
    assert not measured.policy.graph


def test_the_limit_ends_early_but_not_before_three_rounds(sets):
    clock = FakeClock()
    policy = dataclasses.replace(QUICK, rounds=50)
    (measured,) = measure([clock.variant("a", 1e6)], sets[:1], policy, clock, limit_s=1.0)
    assert measured.timing.n == 3
    (measured,) = measure([clock.variant("a", 1.0)], sets[:1], policy, clock, limit_s=1.0)
    assert measured.timing.n == 50


def test_warm_up_lasts(sets):
    clock = FakeClock()
    measure([clock.variant("a", 10.0)], sets[:1], dataclasses.replace(QUICK, warmup_ms=2.0), clock)
    assert clock.now == pytest.approx(2000 + 3 * 40, abs=40)


def test_variants_warm_up_together(sets):
    clock = FakeClock()
    policy = dataclasses.replace(QUICK, warmup_ms=0.2)
    measured, _ = measure([clock.variant("a", 10.0), clock.variant("b", 10.0)], sets, policy, clock)
    names = [name for name, _ in clock.log][:: measured.policy.reps]
    warm = names[: len(names) - 2 * policy.rounds]
    assert len(warm) > 2 and warm == ["a", "b"] * (len(warm) // 2)


def test_spread_is_by_percentiles():
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 100.0]) == Timing(3.5, 2.0, 5.0, 6)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    assert COLD.cold_l2 and not WARM.cold_l2


def test_sets_exceed_twice_the_l2_and_do_not_overlap(sets):
    assert sum(map(touched, sets)) >= 2 * SMALL_L2.l2
    assert sum(map(touched, sets[:-1])) < 2 * SMALL_L2.l2
    pointers = {each.inputs["q"].data_ptr() for each in sets} | {each.outputs["logits"].data_ptr() for each in sets}
    assert len(pointers) == 2 * len(sets)


@pytest.mark.parametrize(("limit", "count"), [("MEMORY_LIMIT", 2), ("SETS_LIMIT", 3)])
def test_sets_are_bounded(monkeypatch, sets, limit, count):
    size = nbytes(sets[0])
    monkeypatch.setattr(room, limit, 2 * size + 1 if limit == "MEMORY_LIMIT" else count)
    huge = dataclasses.replace(H200, l2=10**9)
    bounded = input_sets(OP, SPEC, CASE, huge, device="cpu")
    assert len(bounded) == count
    clock = FakeClock()
    variant = dataclasses.replace(clock.variant("a", 1.0), gpu=huge)
    (measured,) = measure([variant], bounded, QUICK, clock)
    assert not measured.policy.cold_l2, "what fits in L2 must not be called cold"


def test_at_least_one_set(monkeypatch):
    monkeypatch.setattr(room, "MEMORY_LIMIT", 1)
    assert len(input_sets(OP, SPEC, CASE, H200, device="cpu")) == 1


def test_copies_keep_padded_strides():
    padded = torch.arange(24.0).view(3, 8)[:, :5]
    copy = room._clone(padded)
    assert copy.stride() == padded.stride()
    assert torch.equal(copy, padded)


@pytest.mark.gpu
def test_on_the_gpu():
    x = torch.zeros(1 << 24, device="cuda")
    watch = CudaStopwatch()
    graph = watch.capture([lambda: x.add_(1)] * 10)
    assert graph is not None
    assert 10 < watch.time_us(graph) < 1e5

    def synchronises() -> None:
        x.sum().item()

    assert watch.capture([synchronises]) is None
    assert watch.time_us(synchronises) > 0, "a failed capture leaves the device usable"
