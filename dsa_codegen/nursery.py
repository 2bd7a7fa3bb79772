"""A nursery: a process that imports what many workers need once, and forks one whenever it is asked for.

A compiler's imports take two to ten seconds of a core and of the disk; with thirty compilers beside each other that is what a
short tuning run waits for. A fork of a process that has done it takes some milliseconds.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_AGAIN_SECONDS = 0.02
_MESSAGE_BYTES = 1 << 16
_BOOT = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from dsa_codegen import nursery, worker
nursery.serve({handle}, {log!r}, worker.serve)
"""


class Nursery:
    """One process, started by the first child that is asked for or by ``start``; threads may share it.

    Args:
        job: called there once, before anything is forked: what it loads, all children have. What it raises is left to them.
        arguments: of the job; both are pickled.
        environment: variables set before anything is imported; the children have them too.
        log: a file that what it prints is appended to; by default the parent's terminal.
    """

    def __init__(
        self,
        job: Callable[..., None],
        arguments: Sequence[Any] = (),
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self._job, self._environment, self._log = (job, tuple(arguments)), dict(environment or {}), log
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._unborn: deque[Child] = deque()
        self._lock = threading.RLock()  # a question and its answer belong together

    def start(self) -> None:
        """Begin to import, unless it has begun; nothing waits for it."""
        if self._process is not None:
            return
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        boot = _BOOT.format(path=sys.path, handle=theirs.fileno(), log=str(self._log or ""))
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot],
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self._socket.send(pickle.dumps(self._job))

    def child(self, handle: int, environment: Mapping[str, str], log: Path | None) -> Child:
        """A process that serves jobs from the pipe of that file descriptor; it may come into being later.

        Raises:
            OSError: the nursery has ended.
        """
        with self._lock:
            self.start()
            child = Child(self)
            self._send({"environment": dict(environment), "log": str(log or "")}, handle)
            self._unborn.append(child)
            return child

    def await_birth(self, child: Child) -> None:
        """Wait until the child has its number; children are born in the order that they were asked for in."""
        with self._lock:
            while child in self._unborn:
                number = self._receive()["pid"]
                self._unborn.popleft().pid = number

    def code_of(self, pid: int) -> int | None:
        """The exit code of a child that has ended; None while it runs.

        Raises:
            OSError: the nursery has ended, and its children with it.
        """
        with self._lock:
            while self._unborn:
                self.await_birth(self._unborn[-1])
            self._send({"ended": pid})
            code: int | None = self._receive()["code"]
            return code

    def close(self) -> None:
        """End the process; children that are left end soon after it."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _send(self, message: Mapping[str, Any], *handles: int) -> None:
        if self._socket is None:
            raise ConnectionResetError("the nursery is closed")
        socket.send_fds(self._socket, [json.dumps(message).encode()], list(handles))

    def _receive(self) -> Any:
        content = self._socket.recv(_MESSAGE_BYTES) if self._socket is not None else b""
        if not content:
            raise ConnectionResetError("the nursery has ended")
        return json.loads(content)


class Child:
    """A process that a nursery has forked or will fork, with what a worker needs of ``subprocess.Popen``."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._code: int | None = None
        self.pid: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self._code is None:
            try:
                self._code = self._nursery.code_of(self._number())
            except OSError:
                self._code = -signal.SIGKILL
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as soon as it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs longer.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise subprocess.TimeoutExpired("a child of the nursery", timeout)
            time.sleep(_AGAIN_SECONDS)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """Its number is its own until the nursery is asked for its exit code."""
        if self._code is None:
            try:
                os.kill(self._number(), number)
            except OSError:
                return

    def _number(self) -> int:
        if self.pid is None:
            self._nursery.await_birth(self)
        assert self.pid is not None
        return self.pid


def append_to(log: str) -> None:
    """What this process prints goes to the end of a file from here on; nothing changes where none is named."""
    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)


def serve(handle: int, log: str, live: Callable[[int, str, int], None]) -> None:
    """The nursery's side: load, then fork until the parent is gone.

    Args:
        live: what a child does, with its pipe's file descriptor, its log and the number of the process not to be outlived.
    """
    append_to(log)
    asked = socket.socket(fileno=handle)
    content = asked.recv(_MESSAGE_BYTES)
    if not content:
        return
    try:
        job, arguments = pickle.loads(content)
        job(*arguments)
    except Exception as error:  # the children will meet it again, and tell whoever asks them for something
        print(f"the nursery has not loaded everything: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    while True:
        content, handles, _, _ = socket.recv_fds(asked, _MESSAGE_BYTES, 1)
        if not content:
            return
        answer = _answer(json.loads(content), handles, asked, live)
        try:
            asked.send(json.dumps(answer).encode())
        except OSError:  # the parent was killed in between; a child that was just born will see it
            return


def _answer(
    message: Mapping[str, Any], handles: Sequence[int], asked: socket.socket, live: Callable[[int, str, int], None]
) -> Mapping[str, Any]:
    if "ended" in message:
        pid, status = os.waitpid(message["ended"], os.WNOHANG)
        return {"code": os.waitstatus_to_exitcode(status) if pid else None}
    parent, (handle,) = os.getpid(), handles
    pid = os.fork()
    if not pid:
        _live(lambda: live(handle, message["log"], parent), asked, message["environment"])
    os.close(handle)
    return {"pid": pid}


def _live(life: Callable[[], None], asked: socket.socket, environment: Mapping[str, str]) -> NoReturn:
    """In the child, which must not return into the nursery's loop, however its life ends."""
    code = 1
    try:
        asked.close()
        os.environ.update(environment)
        life()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        os._exit(code)
