"""A contest on a fake clock: who is compared, who is timed, and what is said of the others."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools

import pytest

from dsa_codegen.bench import contest
from dsa_codegen.bench.cases import case
from dsa_codegen.bench.contest import OURS, How
from dsa_codegen.bench.stages import OpStage
from dsa_codegen.bench.summary import failure, summarise
from dsa_codegen.proof.measure import Measured
from dsa_codegen.proof.timing import Policy, Timing

import bench_fakes
from bench_support import SHEET, SMALL
from support import H200

GPU = dataclasses.replace(H200, l2=20_000)
QUICK = Policy(reps=4, rounds=3, warmup_ms=0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that our calls move by 2 µs and the fakes' by 3."""
    clock = bench_fakes.Clock()
    real = OpStage.ours

    def ours(self, case, inputs):
        prepared = real(self, case, inputs)

        def run():
            clock.now += 2.0
            clock.log.append(OURS)
            return prepared.run()

        return dataclasses.replace(prepared, run=run)

    monkeypatch.setattr(OpStage, "ours", ours)
    for peer in bench_fakes.PEERS:
        monkeypatch.setattr(peer, "clock", clock)
    return clock


def hold(clock, *, without=(), case=SMALL):
    how = How(QUICK, dataclasses.replace(QUICK, cold_l2=False), device="cpu", stopwatch=clock)
    return contest.hold(case, GPU, ["bench_fakes"], without, how)


@pytest.fixture
def entries(clock):
    return {entry.name: entry for entry in hold(clock).entries}


def test_those_who_agree_are_timed(entries):
    assert entries[OURS].timing.median == 2.0
    assert entries["fast"].timing.median == 3.0
    assert entries[OURS].similarity < 1e-6 and entries["fast"].similarity == 0.0


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("missing", "missing is not installed"),
        ("broken", "cannot be looked at: KeyError: 'driver'"),
        ("disagreeing", "disagrees: logits: similarity"),
        ("raising", "failed: ValueError: an answer that nobody wants"),
    ],
)
def test_the_others_say_why_not(entries, name, note):
    assert entries[name].timing is None
    assert entries[name].note.startswith(note)


def test_who_does_not_serve_a_case_has_no_entry(entries):
    assert "unwilling" not in entries


def test_a_padded_peer_is_named_so(entries):
    assert entries["padded (padded to 64)"].timing.median == 3.0
    assert "padded" not in entries


def test_contestants_take_turns(clock):
    hold(clock, without=("padded", "crashing"))
    turns = [clock.log[0]]
    turns += [name for before, name in itertools.pairwise(clock.log) if name != before]
    assert turns[-6:] == [OURS, "fast"] * 3


def test_memory_that_another_has_filled_does_not_pass(clock, monkeypatch):
    lazy = bench_fakes.Lazy("lazy")
    monkeypatch.setattr(lazy, "kept", [])
    monkeypatch.setattr(bench_fakes, "PEERS", (lazy, lazy))
    first, second = [entry for entry in hold(clock).entries if entry.name == "lazy"]
    assert {first.note[:9], second.note[:9]} == {"", "disagrees"}


def test_ours_without_a_right_answer_has_no_time(clock, monkeypatch):
    real = OpStage.ours

    def wrong(self, case, inputs):
        prepared = real(self, case, inputs)
        return dataclasses.replace(prepared, run=lambda: prepared.run() + 1)

    monkeypatch.setattr(OpStage, "ours", wrong)
    row = summarise(SMALL, hold(clock), SHEET)
    assert row["ours_us"] is None and row["ratio"] is None
    assert row["notes"][OURS].startswith("disagrees")
    assert row["peers"]["fast"] == 3.0 and row["best_peer"] == "fast"


def test_a_row_sums_it_up(clock):
    row = summarise(SMALL, hold(clock), SHEET)
    assert (row["ours_us"], row["best_peer"], row["ratio"]) == (2.0, "fast", 1.5)
    assert row["peers"] == {"fast": 3.0, "crashing": 3.0, "padded (padded to 64)": 3.0}
    assert row["limit_us"] >= 0 and row["cold"] and row["sets"] > 1
    assert "block_n=" in row["ours_variant"] and row["ours_variant"].endswith("[default]")
    assert row["warm_us"] == {}


def test_a_row_knows_the_versions_and_promises_of_its_peers(clock, monkeypatch):
    monkeypatch.setattr(bench_fakes.Fake, "ordered", False)
    facts = summarise(SMALL, hold(clock), SHEET)["peer_facts"]
    version = f"torch {importlib.metadata.version('torch')}"
    assert facts["fast"] == {"version": version, "deterministic": True, "ordered": False}
    assert set(facts) == {"fast", "crashing", "padded (padded to 64)"}, "of those who have a time"


def test_a_peer_may_be_allowed_to_differ_by_more(clock, monkeypatch):
    monkeypatch.setattr(bench_fakes.Disagreeing, "similarity", 0.5)
    entries = {entry.name: entry for entry in hold(clock).entries}
    assert entries["disagreeing"].timing and 1e-4 < entries["disagreeing"].similarity < 0.5


def test_decode_is_also_timed_warm(clock):
    shape = {"batch": 2, "next_n": 1, "context": 128, "heads": 8, "head_dim": 64, "page": 64}
    row = summarise(case("indexer_decode", "full", shape), hold(clock, case=case("indexer_decode", "full", shape)), SHEET)
    assert row["warm_us"] == {OURS: 2.0}
    assert row["peers"] == {} and row["best_peer"] is None and row["ratio"] is None


def test_who_is_far_behind_is_not_timed_warm():
    times = [Timing.of([us]) for us in (2.0, 19.0, 21.0)]
    assert contest._near([Measured(timing, QUICK, 1) for timing in times]) == [0, 1]
    assert contest._near([]) == []


def test_a_contest_can_do_without_ours(clock):
    entries = hold(clock, without=(OURS,)).entries
    assert OURS not in {entry.name for entry in entries}
    assert {entry.name for entry in entries if entry.timing} == {"fast", "crashing", "padded (padded to 64)"}


def test_a_contest_that_did_not_come_about_is_a_row():
    row = failure(SMALL, {OURS: "failed: the device is gone", "fast": "crashed"}, SHEET)
    assert row["ours_us"] is None and row["peers"] == {}
    assert row["notes"] == {OURS: "failed: the device is gone", "fast": "crashed"}
