"""A whole tuning run: what it writes, and what it says of what it did not find."""

from __future__ import annotations

import os

import pytest

from dsa_codegen import paths
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.indexer import IndexerSpec
from dsa_codegen.problem.op import Accuracy
from dsa_codegen.records.default import default_sha
from dsa_codegen.records.lookup import lookup
from dsa_codegen.tune import opening, stock
from dsa_codegen.tune import run as room
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.plan import Budget, problems
from dsa_codegen.tune.pool import CompilePool
from dsa_codegen.tune.run import tune

from support import H200
from toy import OP
from tune_jobs import landscape, timed
from tune_support import CASE, DEFAULT, SPEC, TRIALS, InstantGpu, stored


def test_every_bucket_gets_a_record_that_the_lookup_serves(go, tmp_path):
    report = go()
    wanted = problems([(OP, SPEC)], H200)
    assert [record.sizes for record in report.records] == [problem.case.sizes.to_dict() for problem in wanted]
    assert report.files == (tmp_path / "tuned" / "h200" / "indexer.json",)
    assert not report.interrupted and not report.notes
    for problem in wanted:
        found = lookup(OP, SPEC, problem.case.sizes, H200, {"tuned": tmp_path / "tuned"})
        assert (found.origin, found.stale, found.notes) == ("tuned", False, ())


def test_a_record_tells_how_it_came_about(go, one_bucket):
    (record,) = go(seed=5).records
    assert record.evidence == "measured"
    assert record.default_time_us == pytest.approx(landscape(DEFAULT))
    assert record.default_sha == default_sha(OP, SPEC, DEFAULT)
    assert record.time_us.median == landscape(record.config_for(OP)) < record.default_time_us
    assert record.limit_us == OP.cost(SPEC, CASE).limit_us(H200)
    assert record.accuracy == {"max_abs": 1e-6, "similarity": 1e-9}
    assert record.search["trials"] == record.search["ok"] == TRIALS
    assert (record.search["final"], record.search["seed"]) == (1, 5)
    times = [runner.time_us for runner in record.runners_up]
    assert times == sorted(times) and 0 < len(times) <= 5
    assert set(record.toolchain) == {"triton", "torch", "cuda", "driver"}


def test_the_final_holds_the_fastest_and_the_default(go, one_bucket, tmp_path):
    slow_default = InstantGpu(
        lambda task: timed(landscape(task.candidate.config) * (9 if task.candidate.config == DEFAULT else 1))
    )
    slow_default.folder = tmp_path / "builds"
    go(slow_default, budget=Budget(60.0, 16))
    (field,) = slow_default.finals
    assert DEFAULT in field
    assert len(field) == 9


def test_the_default_stays_where_nothing_is_better(go, one_bucket):
    evaluator = InstantGpu(lambda task: timed(100.0))
    evaluator.final = lambda problem, candidates, limit_s: None
    (record,) = go(evaluator).records
    assert record.config_for(OP) == DEFAULT
    assert record.search["final"] == 0


def test_a_winner_that_fails_its_last_check_is_struck_off(go, one_bucket, tmp_path):
    (usual,) = go().records
    evaluator = InstantGpu(folder=tmp_path / "builds")
    evaluator.refusals = 1
    report = go(evaluator)
    assert report.records[0].config != usual.config
    assert report.studies[0].counts[Kind.MISMATCH] == 1


def test_where_nothing_is_right_nothing_is_written(go, one_bucket, tmp_path):
    wrong = Outcome(Kind.MISMATCH, accuracy=Accuracy(False, 1.0, 1.0), detail="logits: 7 values outside tolerance")
    report = go(InstantGpu(lambda task: wrong))
    assert report.records == () and stored(tmp_path) == ()
    (note,) = report.notes
    (missing,) = report.missing
    assert missing.failed and "none of the 8 candidates" in missing.reason
    assert "8 of 8 candidates: mismatch" in note and "7 values outside tolerance" in note


def test_no_record_before_the_default_was_tried(go, one_bucket, tmp_path):
    class Withholds(InstantGpu):
        def _advance(self):
            kept = [task for task in self._ready if task.candidate.config == DEFAULT]
            self._ready = [task for task in self._ready if task not in kept]
            done = super()._advance()
            self._ready = kept
            return done

    def interrupt(progress):
        if progress.studies[0].evaluated >= 3:
            raise KeyboardInterrupt

    report = go(Withholds(folder=tmp_path / "builds"), notify=interrupt)
    assert report.studies[0].evaluated >= 3
    assert report.records == ()


def test_an_earlier_record_is_a_seed(go, one_bucket, tmp_path):
    (record,) = go().records
    evaluator = InstantGpu(folder=tmp_path / "builds")
    go(evaluator, fresh=True)
    assert [task.candidate.config for task in evaluator.judged[:2]] == [DEFAULT, record.config_for(OP)]


def test_the_winner_is_kept_and_losers_within_a_limit(go, one_bucket, tmp_path, monkeypatch):
    """The next run, of whatever aim, finds the builds; what is over the limit and was not used of late goes."""
    builds = tmp_path / ".tune" / "h200" / "builds"
    evaluator = InstantGpu(folder=builds)
    (record,) = go(evaluator).records
    assert (paths.cache() / record.source_sha[:32]).is_dir()
    assert len(list(builds.iterdir())) >= 1 and not list(builds.parent.glob("*.clock"))
    pools = []
    monkeypatch.setattr(room, "CompilePool", lambda gpu, cache, size, **how: pools.append(cache) or CompilePool(gpu, cache, 1))
    go(evaluator, backends=("triton",), fresh=True)
    assert pools == [builds] and list(builds.iterdir())


def test_builds_that_were_used_last_stay(tmp_path):
    for number in range(4):
        (tmp_path / f"build{number}").mkdir()
        (tmp_path / f"build{number}" / "kernel.cubin").write_bytes(bytes(1000))
        os.utime(tmp_path / f"build{number}", (number, number))
    stock.used(tmp_path / "build0")  # by a run that is under way
    stock.trim(tmp_path, limit=2000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build0", "build3"]
    stock.used(tmp_path / "build3")
    stock.trim(tmp_path, limit=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build0", "build3"], "both were used within the hour"


def test_what_the_budget_did_not_reach_is_named(go):
    report = go(budget=Budget(1e-6, TRIALS))
    assert report.records == () and len(report.missing) == 4
    assert {each.reason for each in report.missing} == {"the budget ended before its default was timed"}
    assert not any(each.failed for each in report.missing)
    assert go().missing == ()


def test_what_is_left_out_is_said(go, one_bucket, monkeypatch):
    assert "sm_89 or newer" in go(gpu=resolve("A100")).notes[0]
    monkeypatch.setattr(opening, "missing_tool", lambda backend: f"{backend} (nvcc was not found)")
    report = go()
    assert report.notes == ("indexer: left out triton (nvcc was not found)",)
    assert report.records == ()


def test_a_problem_is_tuned_once_however_often_it_is_asked_for():
    assert len(problems([(OP, SPEC)] * 2, H200)) == len(problems([(OP, SPEC)], H200)) == 4


@pytest.mark.slow
def test_offline_ranks_what_really_compiles(one_bucket, tmp_path):
    seen = []
    spec = IndexerSpec(8, 64)
    report = tune(
        [(OP, spec)],
        H200,
        tmp_path / "tuned",
        offline=True,
        processes=2,
        budget=Budget(60.0, 3),
        state=tmp_path / ".tune",
        notify=seen.append,
    )
    (record,) = report.records
    assert (record.evidence, record.policy, record.accuracy) == ("modelled", None, None)
    assert record.time_us.n == 0 and record.time_us.median > record.limit_us
    assert seen[-1].phase == "done" and seen[-1].fraction == 1.0
    assert "no sweep has judged" in report.notes[-1]
    assert lookup(OP, spec, CASE.sizes, H200, {"tuned": tmp_path / "tuned"}).origin == "modelled"


@pytest.mark.gpu
def test_on_the_gpu(one_bucket, tmp_path):
    report = tune(
        [(OP, IndexerSpec(8, 64))],
        resolve("auto"),
        tmp_path / "tuned",
        budget=Budget(90.0, 4),
        state=tmp_path / ".tune",
    )
    (record,) = report.records
    assert (record.evidence, record.search["final"]) == ("measured", 1)
    assert record.policy.graph


def test_a_database_keeps_the_trials_for_another_machine(go, one_bucket, tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    first, second = InstantGpu(folder=tmp_path / "builds"), InstantGpu(folder=tmp_path / "builds")
    go(first, storage=url, state=tmp_path / "one")
    report = go(second, storage=url, state=tmp_path / "two")
    assert len(first.judged) == TRIALS and not second.judged and len(second.finals) == 1
    assert report.records[0].search["trials"] == TRIALS
    assert not list(tmp_path.glob("**/*.journal"))
