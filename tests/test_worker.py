"""The worker: what cannot be sent, what dies, what raises, and what it leaves alone leave it ready for the next job."""

from __future__ import annotations

import operator
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsa_codegen.worker import JobFailed, Worker, WorkerDied, WorkerTimeout


@pytest.fixture(scope="module")
def worker():
    with Worker({"A_VARIABLE": "its own"}) as made:
        yield made


def test_a_job_that_cannot_be_pickled_does_not_keep_it_busy(worker):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        worker.call(lambda: 1)
    assert not worker.busy
    assert worker.call(operator.add, 1, 2) == 3


def test_a_job_that_cannot_be_found_there_is_an_error_of_the_job(worker):
    process = worker.call(os.getpid)
    with pytest.raises(JobFailed, match="Unfindable"):
        worker.call(operator.add, Unfindable(), 1)
    assert worker.call(os.getpid) == process


class Unfindable:
    """Can be sent, and raises where it is received."""

    def __reduce__(self):
        return operator.getitem, ({}, "Unfindable")


def test_what_a_job_raises_is_told_and_survived(worker):
    process = worker.call(os.getpid)
    for error in ("EOFError", "KeyError"):
        with pytest.raises(JobFailed) as raised:
            worker.call(exec, f"raise {error}('the reason')")
        assert (raised.value.kind, "the reason" in raised.value.message) == (error, True)
    assert worker.call(os.getpid) == process


def test_a_crash_and_a_hang_cost_the_child_only(worker):
    with pytest.raises(WorkerDied, match=r"exit code 7"):
        worker.call(os._exit, 7)
    with pytest.raises(WorkerDied, match=f"exit code -{int(signal.SIGKILL)}"):
        worker.call(exec, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(WorkerTimeout):
        worker.call(time.sleep, 60, timeout=0.5)
    assert worker.call(operator.add, 1, 2) == 3


def test_the_child_has_the_path_and_the_variables(worker):
    assert worker.call(os.getenv, "A_VARIABLE") == "its own"
    assert "A_VARIABLE" not in os.environ
    assert worker.call(eval, "__import__('sys').path") == sys.path


def test_ctrl_c_is_the_parents_to_hear(worker):
    worker.call(exec, "import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    assert worker.call(operator.add, 1, 2) == 3


def test_the_log_takes_what_the_child_prints(tmp_path):
    log = tmp_path / "logs" / "worker.log"
    with Worker(log=log) as worker:
        worker.call(exec, "import os; os.system('echo from a compiler'); print('from python', flush=True)")
    assert log.read_text().split("\n")[:2] == ["from a compiler", "from python"]


LEFT = """
from dsa_codegen.worker import Worker
import os, time
worker = Worker()
print(worker.call(os.getpid), flush=True)
worker.submit(time.sleep, 600)
"""


KILLED = """
from dsa_codegen.worker import Worker
import os, signal, time
worker = Worker()
print(worker.call(os.getpid), flush=True)
worker.submit(time.sleep, 600)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_child_ends_with_a_parent_that_was_killed():
    """A parent that had no time to close anything; the child's job would go on for ever."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_the_child_ends_with_its_parent():
    """Even in the middle of a job, and where nobody closed the worker."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, env=environment, timeout=60)
    child = int(done.stdout)
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
