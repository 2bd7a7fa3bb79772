"""Lane: one GPU of the host and the process that uses it, which may crash or hang; one candidate at a time."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.build import Built
from ..nursery import Nursery
from ..problem.op import Accuracy
from ..proof.measure import Measured
from ..proof.timing import Timing
from ..worker import JobFailed, Worker, WorkerDied, WorkerTimeout
from . import jobs
from .account import INPUTS, JUDGING, STARTING, Stopwatch
from .evaluate import Task
from .outcome import Kind, Outcome
from .problem import Entrant, Problem

PREPARE_SECONDS = 180.0
RUN_SECONDS = 20.0
PATIENT_SECONDS = 5.0
"""In a process that has judged others, a candidate may take at least so long, and _SLOWER times the problem's slowest."""
_SLOWER = 8.0
_IDLE_SECONDS = 0.005
_DRAWING_S = 1.0  # until it is known
# After these the process's CUDA context is of no use; other errors (too many resources, out of memory) leave it whole.
POISONED = re.compile(r"illegal|misaligned|launch failure|device-side assert|CUDA error|CUDA_ERROR", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|MemoryError|ERROR_OUT_OF_MEMORY", re.IGNORECASE)


@dataclass(frozen=True)
class Jobs:
    """What runs in the GPU's process; other functions than these are for tests."""

    prepare: Callable[..., None] = jobs.prepare
    evaluate: Callable[..., Outcome] = jobs.evaluate
    final: Callable[..., list[Measured]] = jobs.final
    recheck: Callable[..., Accuracy] = jobs.recheck
    gate: Callable[..., Outcome] = jobs.gate
    eager: Callable[..., list[Timing]] = jobs.eager
    card: Callable[[], str] = jobs.card
    load: Callable[[], None] = jobs.load
    """Called once for all processes, which are forked after it."""


JOBS = Jobs()


@dataclass(frozen=True)
class Judged:
    """A task that a lane is done with, and the seconds that it took."""

    task: Task
    outcome: Outcome
    seconds: float


class Lane:
    """See the module's first line.

    Args:
        device: of ``CUDA_VISIBLE_DEVICES`` in the process; empty: what this process sees, the current one.
        nursery: forks the process, and each that takes its place; by default it begins from nothing.
    """

    def __init__(self, table: Jobs = JOBS, log: Path | None = None, device: str = "", nursery: Nursery | None = None) -> None:
        self.worker = Worker({"CUDA_VISIBLE_DEVICES": device} if device else None, log, nursery)
        self.at_hand: str | None = None
        """The problem whose inputs lie in the process."""
        self.current: Task | None = None
        self._built: Built | None = None
        self._jobs = table
        self._begun = 0.0
        self._ran = 0.0
        self._preparing = False
        self._fresh = True
        self._warming: Problem | None = None
        self._warmed = False
        self._slowest: dict[str, float] = {}
        self._drawings: list[float] = []
        self._opening = False
        self.spent = Stopwatch()
        self.judged = 0

    @property
    def busy(self) -> bool:
        """Whether there is nothing to collect and nothing can be begun."""
        return self.worker.busy and not self.worker.ready()

    @property
    def drawing_s(self) -> float:
        """Seconds that it takes to turn to another problem, on average so far."""
        return statistics.fmean(self._drawings) if self._drawings else _DRAWING_S

    def open(self) -> None:
        """Start the process while nothing is known of what it will run: until its device is up it takes seconds."""
        self._opening = True
        self.submit(self._jobs.card, timeout=PREPARE_SECONDS)

    def warm(self, task: Task) -> None:
        """While its first candidates compile: starting the process and drawing inputs takes about as long."""
        if not self._warmed:
            self._warmed, self._warming = True, task.problem
            self.spent.turn_to(INPUTS)
            self.submit(self._jobs.prepare, task.problem, task.candidate.config.backend, timeout=PREPARE_SECONDS)

    def begin(self, task: Task, built: Built) -> None:
        """Start with a task."""
        self.current, self._built, self._begun = task, built, time.monotonic()
        self._preparing = task.problem.id != self.at_hand
        if self._preparing:
            self.spent.turn_to(INPUTS if self.worker.alive else STARTING)
            self.submit(self._jobs.prepare, task.problem, task.candidate.config.backend, timeout=PREPARE_SECONDS)
        else:
            self._run(task)

    def _run(self, task: Task) -> None:
        best = task.study.best
        assert self._built is not None
        entrant = Entrant(task.candidate, self._built)
        timeout = self._patience(task.problem)
        self.spent.turn_to(JUDGING)
        self._ran = time.monotonic()
        self.submit(self._jobs.evaluate, task.problem, entrant, best.time_us if best else None, timeout=timeout)

    def _patience(self, problem: Problem) -> float:
        """Seconds for a candidate: a hang costs less once it is known what others take where everything is loaded."""
        slowest = None if self._fresh else self._slowest.get(problem.id)
        return RUN_SECONDS if slowest is None else min(RUN_SECONDS, max(PATIENT_SECONDS, _SLOWER * slowest))

    def collect(self) -> Judged | None:
        """Take the result of the job that is over; nothing is judged yet where that was a preparation."""
        if self._opening or self._warming is not None:
            self._end_warming()
            return None
        task = self.current
        if task is None:
            return None
        result, failure = self.attempt(self.worker.result)
        if self._preparing:
            self._preparing = False
            if failure is None:
                self._drawings.append(time.monotonic() - self._begun)
                self.at_hand = task.problem.id
                self._run(task)
                return None
            outcome = Outcome(failure.kind, detail=f"the problem cannot be set up: {failure.detail}", fatal=True)
        else:
            outcome = failure or result
        self.current = None
        self.judged += 1
        self._learn(task.problem, outcome)
        return Judged(task, outcome, time.monotonic() - self._begun)

    def _learn(self, problem: Problem, outcome: Outcome) -> None:
        if outcome.ok and not self._fresh:
            seconds = time.monotonic() - self._ran
            self._slowest[problem.id] = max(seconds, self._slowest.get(problem.id, 0.0))
        self._fresh = not self.worker.alive
        if outcome.kind is Kind.OUT_OF_BOUNDS:  # whatever lies beside the outputs may be spoilt, inputs and reference too
            self.end()

    def _end_warming(self) -> None:
        problem, self._warming, self._opening = self._warming, None, False
        _, failure = self.attempt(self.worker.result)
        if failure is None and problem is not None:
            self.at_hand = problem.id  # a failure will show again, where it has a task to be told to

    def submit(self, job: Callable[..., Any], *args: Any, timeout: float) -> None:
        """Give the process a job; a new process, where the old one died."""
        try:
            self.worker.submit(job, *args, timeout=timeout)
        except WorkerDied:  # it died while it was idle: that is no candidate's fault
            self.at_hand = None
            self.worker.submit(job, *args, timeout=timeout)

    def attempt(self, call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Outcome | None]:
        """The result of a job, or what its failure means; a process that can no longer be used is ended."""
        try:
            return call(*args, **options), None
        except WorkerTimeout as error:
            failure = Outcome(Kind.RUN_TIMEOUT, detail=str(error))
        except WorkerDied as error:
            failure = Outcome(Kind.WORKER_DIED, detail=str(error))
        except JobFailed as error:
            failure = Outcome(_kind(error), detail=f"{error.kind}: {error.message}"[:500])
            if POISONED.search(error.message):
                self.worker.kill()
        if not self.worker.alive:
            self.at_hand = None
        return None, failure

    def wait_for(self, job: Callable[..., Any], *args: Any, timeout: float, meanwhile: Callable[[], None]) -> Any:
        """The result of a job, ``meanwhile`` being called several times a second."""
        if self._opening or self._warming is not None:  # the search ended before the process was up
            self._end_warming()
        self.submit(job, *args, timeout=timeout)
        while not self.worker.ready():
            meanwhile()
            time.sleep(_IDLE_SECONDS)
        return self.worker.result()

    def end(self) -> None:
        """End the process; the next job starts another."""
        self.worker.kill()
        self.at_hand, self._fresh = None, True


def _kind(error: JobFailed) -> Kind:
    """What an exception of a job says of the candidate."""
    if _NO_MEMORY.search(f"{error.kind} {error.message}"):
        return Kind.OUT_OF_MEMORY
    return Kind.CONTEXT_LOST if POISONED.search(error.message) else Kind.LAUNCH_ERROR
