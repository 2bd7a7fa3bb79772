"""On the GPU: gates and times candidates in one process that may crash or hang, while others are compiled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..problem.op import Accuracy
from ..proof.measure import Measured
from ..worker import JobFailed, Worker, WorkerDied, WorkerTimeout
from . import jobs
from .evaluate import Done, Evaluator, Task
from .outcome import Kind, Outcome
from .pool import CompilePool
from .problem import Entrant, Problem
from .space import Candidate

PREPARE_SECONDS = 180.0
RUN_SECONDS = 20.0
FINAL_SECONDS = 90.0
GATE_SECONDS = 90.0
_IDLE_SECONDS = 0.005
# After these the process's CUDA context is of no use; other errors (too many resources, out of memory) leave it whole.
POISONED = re.compile(r"illegal|misaligned|launch failure|device-side assert|CUDA error|CUDA_ERROR", re.IGNORECASE)


@dataclass(frozen=True)
class Jobs:
    """What runs in the GPU's process; other functions than these are for tests."""

    prepare: Callable[..., None] = jobs.prepare
    evaluate: Callable[..., Outcome] = jobs.evaluate
    final: Callable[..., list[Measured]] = jobs.final
    recheck: Callable[..., Accuracy] = jobs.recheck
    gate: Callable[..., Outcome] = jobs.gate


JOBS = Jobs()


class GpuEvaluator(Evaluator):
    """See the module's first line."""

    method = "measured"
    search_share = 0.75
    measures = True
    free = False

    def __init__(self, pool: CompilePool, table: Jobs = JOBS, log: Path | None = None) -> None:
        super().__init__(pool)
        self._worker = Worker(log=log)
        self._jobs = table
        self._current: Task | None = None
        self._begun = 0.0
        self._preparing = False
        self._at_hand: str | None = None
        self._warming: Problem | None = None
        self._warmed = False

    @property
    def backlog(self) -> int:
        return super().backlog + (self._current is not None)

    def _advance(self) -> list[Done]:
        if self._worker.busy and not self._worker.ready():
            return []
        done = []
        if self._current is not None:
            done = self._collect(self._current)
        elif self._warming is not None:
            self._end_warming(self._warming)
        if self._current is None and self._ready:
            self._begin()
        elif self._compiling and not self._warmed:
            # While the first candidates compile: starting the process and drawing inputs takes about as long.
            self._warmed = True
            self._warming = self._compiling[0].problem
            backend = self._compiling[0].candidate.config.backend
            self._submit(self._jobs.prepare, self._warming, backend, timeout=PREPARE_SECONDS)
        return done

    def _end_warming(self, problem: Problem) -> None:
        self._warming = None
        _, failure = self._attempt(self._worker.result)
        if failure is None:
            self._at_hand = problem.id  # a failure will show again, where it has a task to be told to

    def _begin(self) -> None:
        """Start a task, of the problem at hand if there is one: drawing inputs anew takes longer than timing."""
        task = next((task for task in self._ready if task.problem.id == self._at_hand), self._ready[0])
        self._ready.remove(task)
        self._current, self._begun = task, time.monotonic()
        self._preparing = task.problem.id != self._at_hand
        if self._preparing:
            self._submit(self._jobs.prepare, task.problem, task.candidate.config.backend, timeout=PREPARE_SECONDS)
        else:
            self._submit_run(task)

    def _submit_run(self, task: Task) -> None:
        best = task.study.best
        entrant = Entrant(task.candidate, self.built(task.candidate))
        self._submit(self._jobs.evaluate, task.problem, entrant, best.time_us if best else None, timeout=RUN_SECONDS)

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
            if POISONED.search(error.message):
                self._worker.kill()
        if not self._worker.alive:
            self._at_hand = None
        return None, failure

    def set_up(self, problem: Problem, backend: str) -> str:
        _, failure = self._attempt(self._wait_for, self._jobs.prepare, problem, backend, timeout=PREPARE_SECONDS)
        return failure.detail if failure else ""

    def gate(self, problem: Problem, candidate: Candidate) -> Outcome:
        entrant = Entrant(candidate, self.built(candidate))
        outcome, failure = self._attempt(self._wait_for, self._jobs.gate, problem, entrant, timeout=GATE_SECONDS)
        return failure or outcome

    def final(self, problem: Problem, candidates: Sequence[Candidate], limit_s: float) -> list[Measured] | None:
        entrants = [Entrant(candidate, self.built(candidate)) for candidate in candidates]
        timeout = PREPARE_SECONDS + FINAL_SECONDS
        return self._attempt(self._wait_for, self._jobs.final, problem, entrants, limit_s, timeout=timeout)[0]

    def recheck(self, problem: Problem, candidate: Candidate) -> Accuracy:
        entrant = Entrant(candidate, self.built(candidate))
        accuracy, failure = self._attempt(self._wait_for, self._jobs.recheck, problem, entrant, timeout=PREPARE_SECONDS)
        return accuracy if failure is None else Accuracy(False, 0.0, 0.0, failure.detail)

    def _wait_for(self, job: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """The result of a job, while the compilers are given what waits for them."""
        if self._warming is not None:  # the search ended before the process was up
            self._attempt(self._worker.result)
            self._warming = None
        self._submit(job, *args, timeout=timeout)
        while not self._worker.ready():
            self.pool.poll()
            time.sleep(_IDLE_SECONDS)
        return self._worker.result()

    def close(self) -> None:
        super().close()
        self._worker.kill()
