"""Honest records: nothing gives way to what is slower or was not timed beside it, and a record says how it was measured."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from dsa_codegen.command import show, show_tuning
from dsa_codegen.ops.indexer import IndexerSizes
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.measure import Measured
from dsa_codegen.proof.timing import COLD, Timing
from dsa_codegen.records import files as records
from dsa_codegen.records.record import entry, parse
from dsa_codegen.tune import opening, standing
from dsa_codegen.tune import run as room
from dsa_codegen.tune.field import Contender, record_of
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.plan import Budget
from dsa_codegen.tune.run import tune

from support import H200
from toy import OP
from tune_jobs import landscape, timed
from tune_support import CASE, DEFAULT, PROBLEM, SPACE, SPEC, InstantGpu, config

GOOD, OTHER = config(block_q=2), config(num_stages=4)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Tune one bucket, each candidate's time as ``us`` says; the report."""
    monkeypatch.setattr(type(OP), "workloads", lambda self, spec: [CASE])
    monkeypatch.setattr(standing, "all_ops", lambda: {OP.name: OP})
    monkeypatch.setattr(opening, "search_path", dict)  # no shipped record has a word in it

    def run(us=landscape, fast=None, fails=(), **options):
        def judge(task):
            if task.candidate.config in fails:
                return Outcome(Kind.MISMATCH, detail="3 values outside tolerance")
            return timed(us(task.candidate.config))

        evaluator = InstantGpu(judge, folder=tmp_path / "builds")
        finals = fast or us
        evaluator.final = lambda problem, candidates, limit_s: [
            Measured(timed(finals(each.config), 0.0).timing, COLD, 1) for each in candidates
        ]
        evaluator.eager = lambda problem, candidates: [Timing(each, each, each, 7) for each in (9.0, 3.0, 5.0)]
        monkeypatch.setattr(room, "GpuEvaluator", lambda pool, **how: evaluator)
        options = {"budget": Budget(60.0, 6), "state": tmp_path / ".tune", "fresh": True, **options}
        return tune([(OP, SPEC)], H200, tmp_path / "tuned", **options)

    return run


def only(best, best_us=50.0, rest_us=100.0):
    """Times of a landscape with one fast config."""
    return lambda choice: best_us if choice == best else rest_us


def stored(tmp_path):
    found = records.read(tmp_path / "tuned" / "h200" / "indexer.json")
    (record,) = (record for record in found if record.bucket == CASE.sizes.bucket())
    return record


def made(choice, microseconds, case=CASE):
    """The record of a config as a search would write it."""
    contender = Contender(SPACE.candidate(choice), timed(microseconds, 0.0), False, eager=Timing(99.0, 98.0, 99.5, 7))
    problem = dataclasses.replace(PROBLEM, case=case)
    return record_of(problem, contender, [contender], DEFAULT, 100.0, {"trials": 9}, "NVIDIA H200")


@pytest.fixture
def good(tmp_path):
    """A record of GOOD, 80 µs; its neighbour's is OTHER, which the search therefore tries as well."""
    neighbour = made(OTHER, 40.0, Case(IndexerSizes(512, 32768), "causal"))
    records.merge(tmp_path / "tuned", [made(GOOD, 80.0), neighbour])
    return stored(tmp_path)


def test_what_is_recorded_runs_in_the_final_and_is_kept_where_it_is_faster(go, good, tmp_path):
    """The search of this run saw it as slow (another process had the GPU, say): side by side it is not."""
    report = go(only(OTHER, 50.0), fast=only(GOOD, 81.0))
    (change,) = report.changes
    assert stored(tmp_path).config_for(OP) == GOOD and change.kept
    assert (change.before.time_us.median, change.now.time_us.median) == (80.0, 81.0)


def test_a_record_older_than_a_parameter_is_kept_where_it_means_the_same(go, good, tmp_path, monkeypatch):
    table = tuple(dataclasses.replace(each, before=1) if each.name == "splits" else each for each in OP.parameters("triton"))
    monkeypatch.setattr(type(OP), "parameters", lambda self, backend: table)
    older = dataclasses.replace(good, config={name: each for name, each in good.config.items() if name != "splits"})
    records.merge(tmp_path / "tuned", [older])
    (change,) = go(only(OTHER, 50.0), fast=only(GOOD, 81.0)).changes
    assert change.kept and "splits" in change.now.config and "splits" not in change.before.config


def test_it_gives_way_to_what_is_faster_beside_it_and_both_times_are_told(go, good, tmp_path, capsys):
    times = {OTHER: 70.0, GOOD: 85.0}
    report = go(lambda choice: times.get(choice, 100.0))
    (change,) = report.changes
    assert stored(tmp_path).config_for(OP) == OTHER
    assert (change.before.time_us.median, change.before_us, change.now.time_us.median) == (80.0, 85.0, 70.0)
    show_tuning.tuned(report)(Console(width=400))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert "80 µs (85 here)" in line and "→ 70 µs" in line and "num_stages=4" in line


def test_noise_replaces_nothing(go, good, tmp_path):
    times = {OTHER: 79.5, GOOD: 80.0}
    go(lambda choice: times.get(choice, 100.0))
    assert stored(tmp_path).config_for(OP) == GOOD


def test_the_default_wins_ties_with_what_is_recorded_too(go, good, tmp_path):
    times = {DEFAULT: 80.5, GOOD: 80.0}
    go(lambda choice: times.get(choice, 100.0))
    assert stored(tmp_path).config_for(OP) == DEFAULT


def test_an_interrupted_run_replaces_no_measured_record(go, good, tmp_path):
    def interrupt(progress):
        if progress.studies[0].evaluated >= 5:
            raise KeyboardInterrupt

    report = go(only(OTHER, 10.0), notify=interrupt)
    assert report.interrupted and report.missing == () and stored(tmp_path) == good


def test_what_could_not_be_timed_beside_it_replaces_nothing(go, good, tmp_path):
    report = go(only(OTHER, 10.0), budget=Budget(60.0, 1))  # the default alone was tried
    assert report.records == () and report.missing == () and stored(tmp_path) == good


def test_what_is_wrong_today_gives_way_and_the_reason_is_told(go, good, tmp_path):
    (change,) = go(fails=(GOOD,)).changes
    assert stored(tmp_path).config_for(OP) != GOOD
    assert change.before_us is None and change.why == "mismatch: 3 values outside tolerance"


def test_eager_and_graph_are_both_stated_where_they_disagree(go, good):
    (record,) = go(only(GOOD, 80.0)).records
    assert record.eager_us.median == 9.0, "the fastest of the final"
    (record,) = go(only(GOOD, 9.5)).records
    assert record.eager_us is None, "within a tenth they say the same"


def test_a_record_says_how_far_it_may_be_trusted(good):
    assert (good.card, good.eager_us) == ("NVIDIA H200", Timing(99.0, 98.0, 99.5, 7))
    assert (good.time_us.n, good.time_us.p20, good.time_us.p80) == (5, 80.0, 80.0)


def test_explain_says_so(good, capsys):
    show.lines(*show.trust(good))(Console(width=200))
    said = capsys.readouterr().out
    assert "5 samples, the middle ones 80 to 80 µs, on one NVIDIA H200, 20" in said
    assert "launched without a graph 99 µs" in said
    unmeasured = dataclasses.replace(good, time_us=Timing.modelled(80.0))
    assert show.trust(unmeasured) == ["a model's word: nothing was timed"] and show.trust(None) == []


def test_what_older_records_lack_is_left_out_of_files(good):
    older = dataclasses.replace(good, card="", eager_us=None)
    assert {"card", "eager_us"}.isdisjoint(entry(older))
    assert parse(entry(older), older.op, older.gpu) == parse(entry(dataclasses.replace(older)), older.op, older.gpu)
