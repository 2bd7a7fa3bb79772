"""The account of a search: seconds by activity add up, GPU by GPU, and are said."""

from __future__ import annotations

import pytest

from dsa_codegen.tune.account import BUILDS, JUDGING, STARTING, Account, Stopwatch
from dsa_codegen.tune.on_gpu import GpuEvaluator
from dsa_codegen.tune.pool import CompilePool
from dsa_codegen.tune.search import Search

import tune_jobs as fake
from support import H200
from tune_support import FAKE, PROBLEM, open_study


def test_a_stopwatch_counts_one_activity_at_a_time():
    now = [10.0]
    watch = Stopwatch(lambda: now[0])
    for activity, until in ((JUDGING, 12.0), (BUILDS, 15.0), (JUDGING, 16.0)):
        now[0] = until
        watch.turn_to(activity)
    now[0] = 20.0
    assert watch.seconds == {STARTING: 2.0, JUDGING: 3.0 + 4.0, BUILDS: 1.0}
    watch.restart()
    assert watch.seconds == {STARTING: 0.0}


def test_a_search_on_two_gpus_says_where_its_time_went(tmp_path):
    study = open_study(tmp_path, trials=12)
    with (
        CompilePool(H200, tmp_path, 2, compile=fake.compile_well) as pool,
        GpuEvaluator(pool, FAKE, devices=("0", "1")) as gpus,
    ):
        search = Search({study: PROBLEM}, gpus, lambda: None)
        search.run(float("inf"))
        account = search.account(wall_s=max(sum(seconds.values()) for seconds, _ in gpus.spent))
    assert sum(account.judged) == len(study.seen) == 12 and len(account.gpus) == 2
    assert all(sum(each.values()) == pytest.approx(account.wall_s, rel=0.1) for each in account.gpus)
    assert account.compiling_s > 0 and account.asked >= 12 and account.compilers == 2
    first, *each, last = account.lines()
    assert first.startswith("search: 12 candidates in ") and [line.split(":")[0].strip() for line in each] == ["GPU 0", "GPU 1"]
    assert "2 compilers, busy " in last and "questions, " in last


def test_without_a_gpu_there_is_nothing_to_say():
    assert not list(Account(1.0, [], [], 2, 0.5, 3, 0.1).lines())
