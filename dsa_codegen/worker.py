"""A child process that runs one job after another under a deadline, so that a crash or a hang costs seconds, not the run.

A CUDA error poisons its process and Triton's interpreter is a setting of the whole process: both belong in a child.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import DsaError
from .nursery import Child, Nursery, append_to

_START_SECONDS = 120.0  # on top of a job's own time, where the child has to start (imports) before it
_GRACE_SECONDS = 1.0
_EXIT_SECONDS = 5.0  # from the closed pipe to an exit code that can be told
_WATCH_SECONDS = 0.5  # after so long a child notices that its parent was killed
# A forked child cannot use CUDA, and one that multiprocessing spawns would run the user's script anew, down to the line that
# wanted the child. Ctrl-C reaches the whole group; what to do then is the parent's to say.
_BOOT = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from dsa_codegen.worker import serve
serve({handle}, {log!r}, {parent})
"""


class WorkerDied(DsaError):
    """The child ended by itself while it ran a job (a segmentation fault, an abort, out of memory)."""


class WorkerTimeout(DsaError):
    """The job ran past its deadline; the child was killed."""


class JobFailed(DsaError):
    """The job raised; ``kind`` is the exception's class name."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace

    def __reduce__(self) -> tuple[type[JobFailed], tuple[str, str, str]]:
        return type(self), (self.kind, self.message, self.trace)


class Worker:
    """One child process, started on the first job and started anew after a crash or a timeout.

    Args:
        environment: variables set in the child before it imports anything (``{"TRITON_INTERPRET": "1"}``).
        log: a file that what the child prints is appended to (compilers print dumps); by default the parent's terminal.
        nursery: forks the child, with what it has imported; by default the child is a process that begins from nothing.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, log: Path | None = None, nursery: Nursery | None = None
    ) -> None:
        self._environment = dict(environment or {})
        self._log = log
        self._nursery = nursery
        self._process: subprocess.Popen[bytes] | Child | None = None
        self._connection: Connection | None = None
        self._deadline: float | None = None
        self._timeout = 0.0
        self._up = False

    def call(self, job: Callable[..., Any], *args: Any, timeout: float = 600.0) -> Any:
        """Run ``job(*args)`` (a function of a module that can be imported) in the child and return its result.

        Raises:
            JobFailed: the job raised.
            WorkerDied: the child ended.
            WorkerTimeout: ``timeout`` seconds passed.
        """
        self.submit(job, *args, timeout=timeout)
        return self.result()

    def submit(self, job: Callable[..., Any], *args: Any, timeout: float = 600.0) -> None:
        """Start a job without waiting for it; one at a time. Its time counts from when the child is up."""
        assert self._deadline is None, "the worker is busy"
        connection = self._start()
        try:
            connection.send((job, args))  # raises at once, before the worker counts as busy, where the job cannot be pickled
        except OSError as error:
            self.kill()
            raise WorkerDied(f"the worker could not be reached: {error}") from error
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout + (0.0 if self._up else _START_SECONDS)

    @property
    def busy(self) -> bool:
        """Whether a submitted job's result has not been taken yet."""
        return self._deadline is not None

    @property
    def alive(self) -> bool:
        """Whether the child runs: not before the first job, nor after a crash or a timeout."""
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        """Whether ``result`` would return or raise at once."""
        if self._deadline is None or self._connection is None:
            return False
        try:
            return self._arrived(self._connection, wait=False) or time.monotonic() > self._deadline
        except (EOFError, OSError):
            return True

    def result(self) -> Any:
        """Wait for the submitted job; see ``call`` for what it raises."""
        assert self._deadline is not None and self._connection is not None, "nothing was submitted"
        connection = self._connection
        try:
            if not self._arrived(connection, wait=True):
                self.kill()
                raise WorkerTimeout(f"no result within {self._timeout:g} s; the worker was killed")
            self._deadline = None
            outcome, value = connection.recv()
        except (EOFError, OSError) as error:
            assert self._process is not None
            code = _ended(self._process, _EXIT_SECONDS)
            self.kill()
            raise WorkerDied(f"the worker ended (exit code {code})") from error
        if outcome == "raised":
            raise JobFailed(*value)
        return value

    def _arrived(self, connection: Connection, wait: bool) -> bool:
        """Whether the result is there, at once or before the deadline; the child's sign of life starts the job's own time."""
        assert self._deadline is not None
        while connection.poll(max(0.0, self._deadline - time.monotonic()) if wait else 0.0):
            if self._up:
                return True
            connection.recv()
            self._up = True
            self._deadline = time.monotonic() + self._timeout
        return False

    def terminate(self) -> None:
        """Ask the child to end; it takes its own children (nvcc) along. ``kill`` makes sure that it does."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End the child, within a second by force; the next job starts a new one."""
        if self._process is not None:
            self._finalizer.detach()
            self._process.terminate()
            _ended(self._process, _GRACE_SECONDS)
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = self._deadline = None
        self._up = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def _start(self) -> Connection:
        if self.alive:
            assert self._connection is not None
            return self._connection
        self.kill()
        self._connection, child = Pipe()
        self._process = self._child(child)
        self._finalizer = weakref.finalize(self, self._process.terminate)  # called at this process's end, too
        child.close()
        return self._connection

    def _child(self, child: Connection) -> subprocess.Popen[bytes] | Child:
        if self._nursery is not None:
            try:
                return self._nursery.child(child.fileno(), self._environment, self._log)
            except OSError:
                self._nursery = None  # it has ended: from nothing, then
        boot = _BOOT.format(path=sys.path, handle=child.fileno(), log=str(self._log or ""), parent=os.getpid())
        return subprocess.Popen(
            [sys.executable, "-c", boot],
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            pass_fds=(child.fileno(),),
        )


def _ended(process: subprocess.Popen[bytes] | Child, seconds: float) -> int | None:
    """The exit code, waiting so long for it; None where the process still runs."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _outlive_nobody(parent: int) -> None:
    """A killed parent closes no child: one whose job hangs would hold its GPU for ever."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def serve(handle: int, log: str, parent: int) -> None:
    """The child's side: run the jobs that come through the pipe until it is closed, or the parent is gone."""
    threading.Thread(target=_outlive_nobody, args=(parent,), daemon=True).start()
    connection = Connection(handle)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    append_to(log)
    connection.send(None)  # the sign of life
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            job, args = pickle.loads(message)
            reply = ("value", job(*args))
        except Exception as error:  # whatever a job raises is the parent's to judge; only text crosses the border
            reply = ("raised", (type(error).__name__, str(error), traceback.format_exc()))
        connection.send(reply)
