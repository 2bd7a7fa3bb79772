"""The nursery: what is loaded once all children have; a crash costs one child, and nobody outlives who started them."""

from __future__ import annotations

import importlib
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsa_codegen.nursery import Nursery
from dsa_codegen.worker import Worker, WorkerDied, WorkerTimeout

LOADED = "'colorsys' in __import__('sys').modules"


@pytest.fixture(scope="module")
def nursery():
    made = Nursery(importlib.import_module, ("colorsys",), {"A_VARIABLE": "of all"})
    yield made
    made.close()


def ask(worker, text):
    return worker.call(eval, text)


def test_children_have_what_was_loaded_and_variables_of_their_own(nursery):
    with Worker({"ANOTHER": "its own"}, nursery=nursery) as one, Worker(nursery=nursery) as two:
        assert ask(one, LOADED) and ask(two, LOADED)
        assert ask(one, "__import__('os').getenv('A_VARIABLE')") == "of all"
        assert [each.call(os.getenv, "ANOTHER") for each in (one, two)] == ["its own", None]
        assert one.call(os.getpid) != two.call(os.getpid)
        assert one.call(os.getppid) == two.call(os.getppid) != os.getpid()


def test_a_crash_and_a_hang_cost_the_child_only(nursery):
    with Worker(nursery=nursery) as worker, Worker(nursery=nursery) as other:
        process = other.call(os.getpid)
        with pytest.raises(WorkerDied, match="exit code 7"):
            worker.call(os._exit, 7)
        with pytest.raises(WorkerDied, match=f"exit code -{int(signal.SIGSEGV)}"):
            worker.call(exec, "import os; os.kill(os.getpid(), 11)")
        with pytest.raises(WorkerTimeout):
            worker.call(time.sleep, 60, timeout=0.5)
        assert worker.call(operator.add, 1, 2) == 3
        assert other.call(os.getpid) == process


def test_what_cannot_be_loaded_is_left_to_the_children(tmp_path):
    log = tmp_path / "log"
    lacking = Nursery(importlib.import_module, ("no_such_module",), log=log)
    with Worker(log=log, nursery=lacking) as worker:
        assert worker.call(operator.add, 1, 2) == 3
        worker.call(print, "of the child")
    lacking.close()
    assert "ModuleNotFoundError" in log.read_text()


def test_where_the_nursery_is_gone_a_child_begins_from_nothing():
    lost = Nursery(importlib.import_module, ("colorsys",))
    worker = Worker(nursery=lost)
    process = worker.call(os.getppid)
    os.kill(process, signal.SIGKILL)
    with worker:
        assert not ask(worker, LOADED) and worker.call(os.getppid) == os.getpid()
    lost.close()


KILLED = """
import importlib, os, signal, time
from dsa_codegen.nursery import Nursery
from dsa_codegen.worker import Worker
worker = Worker(nursery=Nursery(importlib.import_module, ("colorsys",)))
print(worker.call(os.getpid), worker.call(os.getppid), flush=True)
worker.submit(time.sleep, 600)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nobody_outlives_who_was_killed():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    left = [Path(f"/proc/{number}") for number in done.stdout.split()]
    end = time.monotonic() + 10
    while any(each.exists() for each in left) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(left) == 2 and not any(each.exists() for each in left)
