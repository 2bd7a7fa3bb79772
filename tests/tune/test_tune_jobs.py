"""What the GPU's process does with a candidate: gate, probe, rounds, final; here with kernels that are torch."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from dsa_codegen.kernels.backends import Resources
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.problem.op import Case, Cost
from dsa_codegen.proof import fences
from dsa_codegen.proof import measure as measuring
from dsa_codegen.proof.stopwatch import Stopwatch
from dsa_codegen.tune import jobs
from dsa_codegen.tune.outcome import Kind
from dsa_codegen.tune.problem import Entrant, Problem

from support import H200
from toy import OP
from tune_support import DEFAULT, SPACE, config

SPEC = IndexerSpec(8, 64)
GPU = dataclasses.replace(H200, l2=1)  # so that one input set is enough
PROBLEM = Problem(OP, SPEC, Case(IndexerSizes(9, 70), "causal"), GPU)


class Clock(Stopwatch):
    """A microsecond passes where a kernel says so."""

    now = 0.0

    def capture(self, calls):
        return lambda: [call() for call in calls]

    def time_us(self, run):
        before = self.now
        run()
        return self.now - before


@pytest.fixture
def clock(monkeypatch):
    """The jobs on the CPU, on a clock of their own, with nothing left from other tests."""
    made = Clock()
    monkeypatch.setattr(jobs, "DEVICE", "cpu")
    monkeypatch.setattr(jobs, "measure", functools.partial(measuring.measure, stopwatch=made))
    monkeypatch.setattr(jobs, "_memory", lambda: 1 << 34)
    for cache in (jobs._problems, jobs._gated, jobs._loaded):
        cache.clear()
    return made


def entrant(clock, microseconds=500.0, choice=DEFAULT, wrong=lambda logits, call: None):
    """A candidate whose kernel computes the reference, takes its time, and may then spoil the logits."""
    calls = iter(range(10**6))

    def kernel(grid, args):
        clock.now += microseconds
        names = ("q", "k", "k_scale", "weights", "starts", "ends")
        logits = args[6]
        logits.copy_(OP.reference(SPEC, dict(zip(names, args, strict=False)))["logits"])
        wrong(logits, next(calls))

    candidate = SPACE.candidate(choice)
    built = SimpleNamespace(
        rendered=candidate.rendered, resources={"indexer": Resources(64, 0, 4096, 128)}, load=lambda: {"indexer": kernel}
    )
    return Entrant(candidate, built)


def test_a_right_candidate_is_timed(clock):
    outcome = jobs.evaluate(PROBLEM, entrant(clock), None)
    assert outcome.kind is Kind.OK
    assert outcome.time_us == 500.0
    assert outcome.accuracy.passed
    assert (outcome.smem, outcome.dominated) == (4096, False)
    assert outcome.policy.rounds == 5


def test_a_wrong_candidate_is_never_timed(clock, monkeypatch):
    monkeypatch.setattr(jobs, "measure", None)

    def one_value_off(logits, call):
        if logits.numel():
            logits[-1, -1] += 100.0

    outcome = jobs.evaluate(PROBLEM, entrant(clock, wrong=one_value_off), None)
    assert outcome.kind is Kind.MISMATCH
    assert outcome.timing is None
    assert "similarity" in outcome.detail


def test_what_is_left_unwritten_is_found(clock):
    def forgets(logits, call):
        logits[-1:] = torch.nan  # as the poisoned outputs would still be

    assert jobs.evaluate(PROBLEM, entrant(clock, wrong=forgets), None).kind is Kind.MISMATCH


@pytest.mark.parametrize("where", [-1, 1], ids=["before", "behind"])
@pytest.mark.parametrize("when", [0, (9, 70)], ids=["small cases", "workload"])
def test_a_write_beside_the_outputs_is_found(clock, where, when):
    """Whatever it computes: the outputs themselves are right."""

    def strays(logits, call):
        if logits.numel() and when in (0, tuple(logits.shape)):
            room = torch.empty(0, dtype=logits.dtype).set_(logits.untyped_storage())  # fences and all
            beside = room.numel() - fences.BYTES // 4 if where > 0 else fences.BYTES // 4 - 1
            room[beside] = 7.0

    outcome = jobs.evaluate(PROBLEM, entrant(clock, wrong=strays), None)
    assert (outcome.kind, outcome.timing) == (Kind.OUT_OF_BOUNDS, None)
    assert "beside its outputs" in outcome.detail


def test_a_kernel_that_is_wrong_only_on_the_workload_is_found(clock):
    def wrong_when_large(logits, call):
        if logits.shape == (9, 70):
            logits[0, 0] = 1e6

    outcome = jobs.evaluate(PROBLEM, entrant(clock, wrong=wrong_when_large), None)
    assert outcome.kind is Kind.MISMATCH


def test_a_race_is_found(clock):
    def jitters(logits, call):
        if logits.numel():
            logits[0, 0] += call * 1e-6

    outcome = jobs.evaluate(PROBLEM, entrant(clock, wrong=jitters), None)
    assert outcome.kind is Kind.MISMATCH
    assert "repeat differs" in outcome.detail


def test_a_slow_candidate_is_dropped_after_the_probe(clock):
    outcome = jobs.evaluate(PROBLEM, entrant(clock, 2100.0), 1000.0)
    assert (outcome.kind, outcome.dominated, outcome.time_us) == (Kind.OK, True, 2100.0)
    assert outcome.policy.rounds == 1
    assert not jobs.evaluate(PROBLEM, entrant(clock, 1900.0, config(block_q=2)), 1000.0).dominated


def test_a_slow_kernel_is_replayed_fewer_times(clock):
    assert jobs.evaluate(PROBLEM, entrant(clock, 4000.0), None).policy.reps == 5


def test_the_reference_of_a_workload_is_computed_once(clock, monkeypatch):
    jobs.prepare(PROBLEM, "triton")
    drawn = jobs._problems[PROBLEM.id]
    jobs.evaluate(PROBLEM, entrant(clock), None)
    assert jobs._problems[PROBLEM.id] is drawn


def test_a_dear_reference_is_left_to_the_small_cases(clock, monkeypatch):
    monkeypatch.setattr(type(OP), "cost", lambda self, spec, case: Cost(1e15, 1e9, "fp8"))
    jobs.prepare(PROBLEM, "triton")
    assert jobs._problems[PROBLEM.id].reference is None
    assert jobs.evaluate(PROBLEM, entrant(clock), None).kind is Kind.OK


def test_problems_give_way_when_memory_is_short(clock, monkeypatch):
    monkeypatch.setattr(jobs, "_memory", lambda: 1)
    other = Problem(OP, SPEC, Case(IndexerSizes(3, 64), "causal"), GPU)
    jobs.prepare(PROBLEM, "triton")
    jobs.prepare(other, "triton")
    assert list(jobs._problems) == [other.id]


def test_the_final_times_in_turns(clock):
    field = [entrant(clock, 500.0), entrant(clock, 700.0, config(block_q=2))]
    slow, fast = jobs.final(PROBLEM, field[::-1], limit_s=60.0)
    assert (fast.timing.median, slow.timing.median) == (500.0, 700.0)
    assert fast.policy.rounds == 10


def test_the_recheck_finds_what_the_gate_did_not(clock):
    good = entrant(clock)
    assert jobs.recheck(PROBLEM, good).passed

    def late(logits, call):
        if call == 2:
            logits[0, 0] += 1e-6

    jobs._loaded.clear()
    assert "repeat differs" in jobs.recheck(PROBLEM, entrant(clock, wrong=late)).detail
