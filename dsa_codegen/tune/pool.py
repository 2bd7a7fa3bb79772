"""Compile pool: worker processes that turn rendered sources into builds, each source once, under a deadline."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from ..gpu import Gpu
from ..kernels.build import Built, build, preload
from ..kernels.render import Rendered
from ..nursery import Nursery
from ..worker import JobFailed, Worker, WorkerDied, WorkerTimeout
from .outcome import Kind, Outcome
from .stock import used

COMPILE_SECONDS = 60.0

Compile = Callable[[Rendered, Gpu], Built]


def cores(spare: int = 0) -> int:
    """Compilers to run at once: the cores this process may use, less those that it and the one that times need."""
    return max(1, len(os.sched_getaffinity(0)) - spare)


class CompilePool:
    """Compiles sources in ``size`` processes that see no GPU.

    Args:
        cache: the build cache of tuning runs, apart from the user's, so that losers can go; builds found there are used.
        compile: the job; another one for tests.
        log: what the compilers print is appended to it.
        backends: whose compilers are imported once, for all processes.
    """

    def __init__(
        self,
        gpu: Gpu,
        cache: Path,
        size: int,
        *,
        compile: Compile = build,
        deadline_s: float = COMPILE_SECONDS,
        log: Path | None = None,
        backends: Sequence[str] = (),
    ) -> None:
        environment = {"DSA_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._gpu, self._compile, self._deadline_s = gpu, compile, deadline_s
        self._nursery = Nursery(_prepare, (compile, tuple(backends)), environment, log)
        self._workers = [Worker(environment, log, self._nursery) for _ in range(size)]
        self._running: dict[Worker, tuple[Rendered, float]] = {}
        self._queue: deque[Rendered] = deque()
        self._requested: set[str] = set()
        self.results: dict[str, Built | Outcome] = {}
        """By the source's hash: the build, or why there is none."""
        self.seconds: dict[str, float] = {}
        """By the source's hash: how long it took."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self._workers)

    @property
    def backlog(self) -> int:
        """Sources that wait for a process or are in one."""
        return len(self._queue) + len(self._running)

    @property
    def busy_s(self) -> float:
        """Seconds that all processes together have compiled, or waited for the nursery to load."""
        now = time.monotonic()
        return sum(self.seconds.values()) + sum(now - since for _, since in self._running.values())

    def request(self, rendered: Rendered, first: bool = False) -> bool:
        """Compile a source, ahead of all others where it is to be the first; False where that was asked for before."""
        if rendered.sha in self._requested:
            return False
        self._requested.add(rendered.sha)
        (self._queue.appendleft if first else self._queue.append)(rendered)
        self._start()
        return True

    def poll(self) -> None:
        """Collect what has finished and start what waits."""
        for worker in [worker for worker in self._running if worker.ready()]:
            rendered, since = self._running.pop(worker)
            self.results[rendered.sha] = result = _result(worker)
            if isinstance(result, Built):
                used(result.folder)
            self.seconds[rendered.sha] = time.monotonic() - since
        self._start()

    def cancel(self) -> None:
        """Forget what waits; what runs is let finish."""
        self._requested -= {rendered.sha for rendered in self._queue}
        self._queue.clear()

    def keep_only(self, wanted: Sequence[Rendered]) -> None:
        """Give up every other source, also where it is under way."""
        kept = {rendered.sha for rendered in wanted}
        others = [worker for worker, (rendered, _) in self._running.items() if rendered.sha not in kept]
        self._requested -= {rendered.sha for rendered in self._queue} - kept
        self._queue = deque(rendered for rendered in self._queue if rendered.sha in kept)
        for worker in others:
            worker.terminate()  # all at once
        for worker in others:
            self._requested.discard(self._running.pop(worker)[0].sha)
            worker.kill()

    def _start(self) -> None:
        for worker in self._workers:
            if self._queue and worker not in self._running:
                rendered = self._queue.popleft()
                try:
                    worker.submit(self._compile, rendered, self._gpu, timeout=self._deadline_s)
                except WorkerDied as error:
                    self.results[rendered.sha] = Outcome(Kind.WORKER_DIED, detail=f"the compiler: {error}")
                else:
                    self._running[worker] = (rendered, time.monotonic())

    def __enter__(self) -> CompilePool:
        if self._workers:
            self._nursery.start()  # imports begin now, while the studies are opened
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.terminate()  # all at once, so that their last second is one second
        for worker in self._workers:
            worker.kill()
        self._nursery.close()


def _prepare(compile: Compile, backends: Sequence[str]) -> None:
    """Runs in the nursery; to know ``compile`` its module was imported."""
    preload(backends)


def _result(worker: Worker) -> Built | Outcome:
    try:
        built: Built = worker.result()
        return built
    except JobFailed as error:
        return Outcome(Kind.COMPILE_ERROR, detail=error.message)
    except WorkerTimeout as error:
        return Outcome(Kind.COMPILE_TIMEOUT, detail=str(error))
    except WorkerDied as error:
        return Outcome(Kind.WORKER_DIED, detail=f"the compiler: {error}")
