"""No interruption, kill or damage of a tuning run loses what was found, and two runs at once do not touch each other's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dsa_codegen.tune.lock import Patience, StudyBusy, take
from dsa_codegen.tune.plan import Budget

from tune_support import TRIALS, InstantGpu, contents, stored


def test_an_interrupted_run_writes_what_it_has_and_goes_on(go, one_bucket, tmp_path):
    spent = 1.0  # seconds, in the middle of a search

    def interrupt(progress):
        if sum(study.evaluated for study in progress.studies) >= 4:
            time.sleep(spent)
            raise KeyboardInterrupt

    first = go(notify=interrupt)
    assert first.interrupted
    assert [record.search["final"] for record in stored(tmp_path)] == [0]
    evaluator = InstantGpu(folder=tmp_path / "builds")
    second = go(evaluator)
    assert not second.interrupted
    assert second.elapsed_s > spent, "the budget goes on as well"
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
