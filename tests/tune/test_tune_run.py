"""A whole tuning run: what it writes, and that no interruption, crash or damage loses what was found."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dsa_codegen import paths
from dsa_codegen.errors import DsaError, InputError, RecordError, UnknownName
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.problem.op import Accuracy, Case
from dsa_codegen.records import files as records
from dsa_codegen.records.lookup import lookup
from dsa_codegen.tune import opening, standing, stock
from dsa_codegen.tune import run as room
from dsa_codegen.tune.effort import EFFORTS, NORMAL, QUICK, THOROUGH, effort, most_needed
from dsa_codegen.tune.lock import Patience, StudyBusy, take
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.plan import Budget, problems
from dsa_codegen.tune.pool import CompilePool
from dsa_codegen.tune.run import tune

from support import H200
from toy import OP
from tune_jobs import landscape, timed
from tune_support import CASE, DEFAULT, SPEC, InstantGpu

TRIALS = 8


@pytest.fixture
def one_bucket(monkeypatch):
    """The indexer as if it were served at one size only."""
    monkeypatch.setattr(type(OP), "workloads", lambda self, spec: [CASE])


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run with an evaluator that needs no GPU; returns the report."""

    monkeypatch.setattr(standing, "all_ops", lambda: {OP.name: OP})
    monkeypatch.setattr(room, "search_path", dict)
    monkeypatch.setattr(opening, "search_path", dict)  # the shipped records of such kernels are not at stake

    def run(evaluator=None, **options):
        monkeypatch.setattr(room, "GpuEvaluator", lambda pool, **how: evaluator or InstantGpu(folder=tmp_path / "builds"))
        options = {"budget": Budget(60.0, TRIALS), "state": tmp_path / ".tune", **options}
        return tune([(OP, SPEC)], options.pop("gpu", H200), tmp_path / "tuned", **options)

    return run


def stored(tmp_path: Path):
    return records.read(tmp_path / "tuned" / "h200" / "indexer.json")


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


def test_an_interrupted_run_writes_what_it_has_and_goes_on(go, one_bucket, tmp_path):
    def interrupt(progress):
        if sum(study.evaluated for study in progress.studies) >= 4:
            raise KeyboardInterrupt

    first = go(notify=interrupt)
    assert first.interrupted
    assert [record.search["final"] for record in stored(tmp_path)] == [0]
    evaluator = InstantGpu(folder=tmp_path / "builds")
    second = go(evaluator)
    assert not second.interrupted
    assert second.elapsed_s > first.elapsed_s, "the budget goes on as well"
    assert len(evaluator.judged) == TRIALS - first.studies[0].evaluated
    assert [record.search["final"] for record in stored(tmp_path)] == [1]


def test_an_interrupted_final_keeps_the_records_before_it(go, tmp_path):
    def interrupt(progress):
        if progress.finals == 2:
            raise KeyboardInterrupt

    report = go(notify=interrupt)
    assert report.interrupted
    assert sorted(record.search["final"] for record in stored(tmp_path)) == [0, 0, 1, 1]


KILLED = """
    import sys, time
    from pathlib import Path
    from tune_support import *
    from dsa_codegen.tune import run as room
    from dsa_codegen.tune.plan import Budget
    OP.__class__.workloads = lambda self, spec: [CASE]
    def slowly(task):
        time.sleep(0.05)
        return timed(landscape(task.candidate.config))
    room.GpuEvaluator = lambda pool, **how: InstantGpu(slowly)
    here = Path(sys.argv[1])
    room.tune([(OP, SPEC)], H200, here / "tuned", budget=Budget(600.0, 400), state=here / ".tune", notify=lambda p: print(
        sum(study.evaluated for study in p.studies), flush=True))
"""


def test_a_killed_run_goes_on(go, one_bucket, tmp_path):
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests / "support"), str(tests.parent)])
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in child.stdout:
        if int(line) >= 5:
            child.send_signal(signal.SIGKILL)
            break
    child.wait(30)
    evaluator = InstantGpu(folder=tmp_path / "builds")
    go(evaluator, budget=Budget(60.0, 12))
    assert 0 < len(evaluator.judged) <= 7
    assert stored(tmp_path)[0].search["trials"] == 12


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


def test_a_quick_effort_keeps_to_what_is_needed_most(go, tmp_path):
    """The dearest call of each kind; another one where that has a record."""
    first, second = go(effort=QUICK), go(effort=QUICK)
    (one,), (two,) = first.records, second.records
    assert one.sizes == {"queries": 4096, "context": 32768} and two.sizes == {"queries": 4096, "context": 8192}
    assert first.notes == ("effort quick: 1 of 4 calls, the dearest of each kind without a record",)
    assert first.missing == ()


def test_a_quick_effort_leaves_out_what_a_step_does_not_notice():
    wanted = problems([(OP, SPEC)], H200)
    cost = {problem.id: OP.cost(SPEC, problem.case).limit_us(H200) for problem in wanted}
    other = dataclasses.replace(wanted[0], spec=IndexerSpec(8, 32), case=Case(IndexerSizes(8, 64), "causal"))
    assert [problem.id for problem in most_needed([*wanted, other], lambda problem: False)] == [max(cost, key=cost.get)]
    assert most_needed([other], lambda problem: True) == [other], "where everything is served, all is"


@pytest.mark.parametrize("name", EFFORTS)
def test_every_effort_has_budgets(name):
    chosen = effort(name)
    assert chosen.budget(offline=True).trials < chosen.budget(offline=False).trials
    assert QUICK.on_gpu.wall_s + 12 <= 60 < NORMAL.on_gpu.wall_s == 600 < THOROUGH.on_gpu.wall_s
    with pytest.raises(UnknownName, match="quick, normal, thorough"):
        effort("enough")


def test_an_unreadable_file_stops_the_run_before_it_begins(go, tmp_path):
    path = records.path_of(tmp_path / "tuned", "h200", "indexer")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    evaluator = InstantGpu()
    with pytest.raises(RecordError, match=r"indexer\.json"):
        go(evaluator)
    assert not evaluator.judged


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, locks aside."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("fresh", [True, False])
def test_a_second_run_touches_nothing_of_the_first(go, one_bucket, tmp_path, fresh):
    tried = []

    def second(progress):
        if tried or sum(study.evaluated for study in progress.studies) < 4:
            return
        (clock,) = (tmp_path / ".tune" / "h200").glob("*.clock")
        clock.with_suffix(".builds").mkdir()
        clock.with_suffix(".builds").joinpath("kernel.cubin").write_text("a build of the first run")
        tried.append(contents(tmp_path / ".tune"))
        with pytest.raises(StudyBusy, match="nothing was changed: wait"):
            go(fresh=fresh)
        assert contents(tmp_path / ".tune") == tried[0]

    assert len(go(notify=second).records) == 1
    assert any(path.name == "kernel.cubin" for path in tried[0])


def test_a_second_run_that_waits_goes_on_from_what_the_first_found(go, one_bucket, tmp_path):
    second, told, threads = InstantGpu(folder=tmp_path / "builds"), [], []
    patience = Patience(60.0, lambda path: told.append(path.suffix))

    def begin_second(progress):
        if not threads and progress.studies and progress.studies[0].evaluated >= 4:
            threads.append(threading.Thread(target=go, args=(second,), kwargs={"patience": patience}))
            threads[0].start()
            while not told:
                time.sleep(0.01)

    first = InstantGpu(folder=tmp_path / "builds")
    go(first, notify=begin_second)
    threads[0].join(60)
    assert told == [".clock"], "said once"
    assert len(first.judged) == TRIALS and not second.judged
    assert len(second.finals) == 1


def test_waiting_for_one_study_keeps_no_other(tmp_path):
    held = take(tmp_path / "b.journal")
    with pytest.raises(StudyBusy, match=r"b\.journal"):
        Patience(0.3).take_all([tmp_path / "a.journal", tmp_path / "b.journal"])
    take(tmp_path / "a.journal").release()
    held.release()


def test_where_one_study_is_in_use_none_is_forgotten(go, tmp_path):
    go()
    journals = sorted((tmp_path / ".tune" / "h200" / "indexer").glob("*.journal"))
    assert len(journals) == 4
    before = contents(tmp_path / ".tune")
    for path in journals:
        held = take(path)
        with pytest.raises(StudyBusy, match=path.name):
            go(fresh=True)
        held.release()
        assert contents(tmp_path / ".tune") == before
    assert len(go(fresh=True).records) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 99999999999999999}, "seed: got 99999999999999999; expected 0 to 2147483647"),
        ({"seed": -1}, "seed"),
        ({"processes": 0}, "processes"),
        ({"budget": Budget(-1.0, 8)}, "budget"),
        ({"budget": Budget(float("nan"), 8)}, "budget"),
        ({"budget": Budget(1.0, 0)}, "trials"),
        ({"backends": ("cutlass",)}, "unknown backend"),
        ({"state": Path("/dev/null/.tune")}, "state: got /dev/null/.tune; expected a folder that can be written"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_arguments_are_checked_before_anything_is_touched(go, one_bucket, tmp_path, options, words):
    go()
    before = contents(tmp_path)
    with pytest.raises(DsaError, match=re.escape(words)):
        go(fresh=True, **options)
    assert contents(tmp_path) == before, "no journal is blamed for an argument"


def test_a_folder_that_cannot_be_written_is_found_before_the_search(go, one_bucket, tmp_path):
    (tmp_path / "tuned").write_text("a file")
    evaluator = InstantGpu()
    with pytest.raises(InputError, match="tuned is not a folder"):
        go(evaluator)
    assert not evaluator.judged and not (tmp_path / ".tune").exists()


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
