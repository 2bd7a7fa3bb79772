"""On the GPU: gates and times candidates in one process that may crash or hang, while others are compiled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ..measure import Measured
from ..op import Accuracy
from ..worker import JobFailed, Worker, WorkerDied, WorkerTimeout
from . import jobs
from .evaluate import Done, Evaluator, Task
from .jobs import Entrant, Problem
from .outcome import Kind, Outcome
from .pool import CompilePool
from .space import Candidate

PREPARE_SECONDS = 180.0
RUN_SECONDS = 20.0
FINAL_SECONDS = 90.0
# After these the process's CUDA context is of no use; other errors (too many resources, out of memory) leave it whole.
_POISONED = re.compile(r"illegal|misaligned|launch failure|device-side assert|CUDA error|CUDA_ERROR", re.IGNORECASE)


class GpuEvaluator(Evaluator):
    """See the module's first line; ``jobs`` is what runs in the process. Other jobs are for tests."""

    method = "measured"
    free = False

    def __init__(
        self, pool: CompilePool, run: Callable[..., Outcome] = jobs.evaluate, prepare: Callable[..., None] = jobs.prepare
    ) -> None:
        super().__init__(pool)
        self._worker = Worker()
        self._run, self._prepare = run, prepare
        self._current: Task | None = None
        self._begun = 0.0
        self._preparing = False
        self._at_hand: str | None = None

    @property
    def backlog(self) -> int:
        return super().backlog + (self._current is not None)

    def _advance(self) -> list[Done]:
        done = []
        if self._current is not None:
            if not self._worker.ready():
                return []
            done = self._collect(self._current)
        if self._current is None and self._ready:
            self._begin()
        return done

    def _begin(self) -> None:
        """Start a task, of the problem at hand if there is one: drawing inputs anew takes longer than timing."""
        task = next((task for task in self._ready if task.problem.id == self._at_hand), self._ready[0])
        self._ready.remove(task)
        self._current, self._begun = task, time.monotonic()
        self._preparing = task.problem.id != self._at_hand
        if self._preparing:
            self._submit(self._prepare, task.problem, task.candidate.config.backend, timeout=PREPARE_SECONDS)
        else:
            self._submit_run(task)

    def _submit_run(self, task: Task) -> None:
        best = task.study.best
        entrant = Entrant(task.candidate, self._built(task.candidate))
        self._submit(self._run, task.problem, entrant, best.time_us if best else None, timeout=RUN_SECONDS)

    def _submit(self, job: Callable[..., Any], *args: Any, timeout: float) -> None:
        try:
            self._worker.submit(job, *args, timeout=timeout)
        except WorkerDied:  # it died while it was idle: that is no candidate's fault
            self._at_hand = None
            self._worker.submit(job, *args, timeout=timeout)

    def _collect(self, task: Task) -> list[Done]:
        """Take the result of the current job; nothing is done yet where that was the preparation."""
        if self._preparing:
            self._preparing = False
            _, failure = self._attempt(self._worker.result)
            if failure is None:
                self._at_hand = task.problem.id
                self._submit_run(task)
                return []
            outcome = Outcome(failure.kind, detail=f"the problem cannot be set up: {failure.detail}", fatal=True)
        else:
            result, failure = self._attempt(self._worker.result)
            outcome = failure or result
        self._current = None
        return [Done(task, outcome, time.monotonic() - self._begun + self._compile_cost(task))]

    def _attempt(self, call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Outcome | None]:
        """The result of a job, or what its failure means; a process that can no longer be used is ended."""
        try:
            return call(*args, **options), None
        except WorkerTimeout as error:
            failure = Outcome(Kind.RUN_TIMEOUT, detail=str(error))
        except WorkerDied as error:
            failure = Outcome(Kind.WORKER_DIED, detail=str(error))
        except JobFailed as error:
            failure = Outcome(Kind.LAUNCH_ERROR, detail=f"{error.kind}: {error.message}"[:500])
            if _POISONED.search(error.message):
                self._worker.kill()
        if not self._worker.alive:
            self._at_hand = None
        return None, failure

    def final(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Measured] | None:
        """Time candidates in turns; None where that failed."""
        entrants = [Entrant(candidate, self._built(candidate)) for candidate in candidates]
        return self._attempt(self._worker.call, jobs.final, problem, entrants, timeout=PREPARE_SECONDS + FINAL_SECONDS)[0]

    def recheck(self, problem: Problem, candidate: Candidate) -> Accuracy:
        """Run the winner again on the full workload."""
        entrant = Entrant(candidate, self._built(candidate))
        accuracy, failure = self._attempt(self._worker.call, jobs.recheck, problem, entrant, timeout=PREPARE_SECONDS)
        return accuracy if failure is None else Accuracy(False, 0.0, 0.0, failure.detail)

    def __enter__(self) -> GpuEvaluator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.kill()
