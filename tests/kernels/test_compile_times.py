"""scripts/compile_times.py: every CUDA C++ text once, timed alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compile_times
from scripts.compile_times import Timed

from support import H200

ROOT = Path(__file__).resolve().parents[2]


def test_models_that_share_a_text_count_it_once():
    of_both = compile_times.texts(["deepseek-v3.2", "deepseek-v3.2-tp8"], ["select"], H200)
    assert of_both == compile_times.texts(["deepseek-v3.2"], ["select"], H200)
    assert {text.backend for _, text in of_both.values()} == {"cuda"}


def test_the_table_has_a_row_for_each_operation():
    rows = compile_times.table([Timed("select", "a", 1.0), Timed("select", "b", 4.0), Timed("indexer", "c", 2.0)])
    assert [row.split() for row in rows[1:]] == [["indexer", "1", "2.0", "2.0"], ["select", "2", "2.5", "4.0"]]


@pytest.mark.skipif(not shutil.which("gcc"), reason="nvcc needs it")
def test_what_takes_longer_than_it_may_fails():
    run = _script("--preset", "deepseek-v3.2", "--op", "indexer", "--processes", "1", "--most", "0.001")
    assert run.returncode == 1 and not run.stderr
    assert run.stdout.startswith("operation") and "longest: dsa_indexer_cuda_" in run.stdout


def test_where_there_is_nothing_it_says_so():
    run = _script("--preset", "tiny", "--op", "indexer")
    assert run.returncode == 1 and run.stdout == "nothing of that is called in CUDA C++\n"


def _script(*arguments):
    return subprocess.run([sys.executable, "scripts/compile_times.py", *arguments], cwd=ROOT, capture_output=True, text=True)
