"""On the GPU: gates and times candidates in a process per GPU that may crash or hang, while others are compiled.

Candidates are dealt out to all GPUs of a host that are alike. What is compared at last, the finals, runs on the first alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..nursery import Nursery
from ..problem.op import Accuracy
from ..proof.measure import Measured
from ..proof.timing import Timing
from .account import BUILDS, QUESTIONS
from .evaluate import Done, Evaluator, Task
from .lane import JOBS, PREPARE_SECONDS, Jobs, Lane
from .outcome import Kind, Outcome
from .pool import CompilePool
from .problem import Entrant, Problem
from .space import Candidate

_ASKS_NOT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # a process that has asked the driver has no children that could
_STAYS = 4.0  # times what drawing inputs takes: so much more of the time may the problem at hand have had than another
FINAL_SECONDS = 90.0
GATE_SECONDS = 90.0


class GpuEvaluator(Evaluator):
    """See the module's first lines.

    Args:
        table: the jobs of the GPU's process.
        log: what the processes print is appended to it.
        devices: one process for each, ``CUDA_VISIBLE_DEVICES`` there; by default one on the current device.
    """

    method = "measured"
    search_share = 0.75
    measures = True
    free = False

    def __init__(self, pool: CompilePool, table: Jobs = JOBS, log: Path | None = None, devices: Sequence[str] = ("",)) -> None:
        super().__init__(pool)
        self._jobs = table
        self._nursery = Nursery(table.load, environment=_ASKS_NOT, log=log)  # a crash costs a fork, not its imports again
        self.lanes = [Lane(table, log, device, self._nursery) for device in devices]

    @property
    def backlog(self) -> int:
        return super().backlog + sum(lane.current is not None for lane in self.lanes)

    @property
    def width(self) -> int:
        return len(self.lanes)

    @property
    def spent(self) -> Sequence[tuple[Mapping[str, float], int]]:
        return [(lane.spent.seconds, lane.judged) for lane in self.lanes]

    def begin(self) -> None:
        for lane in self.lanes:
            lane.judged = 0
            lane.spent.restart()

    def __enter__(self) -> GpuEvaluator:
        for lane in self.lanes:
            lane.open()
        return self

    def _advance(self) -> list[Done]:
        done = []
        for lane in self.lanes:
            if lane.busy:
                continue
            judged = lane.collect()
            if judged is not None:
                done.append(Done(judged.task, judged.outcome, judged.seconds + self._compile_cost(judged.task)))
            if lane.current is None and not lane.worker.busy:
                self._occupy(lane)
            if not lane.worker.busy:
                lane.spent.turn_to(BUILDS if self._compiling else QUESTIONS)
        return done

    def _occupy(self, lane: Lane) -> None:
        """Give a lane the next task, or the inputs of a task that is still compiled."""
        if self._ready:
            task = self._pick(lane)
            self._ready.remove(task)
            lane.begin(task, self.built(task.candidate))
        elif self._compiling:
            others = {each.at_hand for each in self.lanes if each is not lane}
            lane.warm(next((task for task in self._compiling if task.problem.id not in others), self._compiling[0]))

    def _pick(self, lane: Lane) -> Task:
        """What a study tries first, else of the problem at hand while others have not had much less of the time.

        Problems that another GPU has at hand come last: their inputs would be drawn twice.
        """
        others = {each.at_hand for each in self.lanes if each is not lane}

        def order(task: Task) -> tuple[bool, bool, float]:
            own = task.problem.id == lane.at_hand
            return (
                bool(task.study.seen),
                not own and task.problem.id in others,
                task.study.spent_s - _STAYS * lane.drawing_s * own,
            )

        return min(self._ready, key=order)

    def set_up(self, problem: Problem, backend: str) -> str:
        _, failure = self._first(self._jobs.prepare, problem, backend, timeout=PREPARE_SECONDS)
        return failure.detail if failure else ""

    def gate(self, problem: Problem, candidate: Candidate) -> Outcome:
        entrant = Entrant(candidate, self.built(candidate))
        outcome, failure = self._first(self._jobs.gate, problem, entrant, timeout=GATE_SECONDS)
        if failure is None and outcome.kind is Kind.OUT_OF_BOUNDS:
            self.lanes[0].end()
        return failure or outcome

    def judge(self, problem: Problem, candidate: Candidate) -> Outcome:
        """Gate and time a built candidate as a search does, and wait for it."""
        entrant = Entrant(candidate, self.built(candidate))
        outcome, failure = self._first(self._jobs.evaluate, problem, entrant, None, timeout=GATE_SECONDS)
        return failure or outcome

    def final(self, problem: Problem, candidates: Sequence[Candidate], limit_s: float) -> list[Measured] | None:
        entrants = [Entrant(candidate, self.built(candidate)) for candidate in candidates]
        return self._first(self._jobs.final, problem, entrants, limit_s, timeout=PREPARE_SECONDS + FINAL_SECONDS)[0]

    def eager(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Timing]:
        entrants = [Entrant(candidate, self.built(candidate)) for candidate in candidates]
        return self._first(self._jobs.eager, problem, entrants, timeout=PREPARE_SECONDS + FINAL_SECONDS)[0] or []

    @functools.cached_property
    def card(self) -> str:
        return self._first(self._jobs.card, timeout=PREPARE_SECONDS)[0] or ""

    def recheck(self, problem: Problem, candidate: Candidate) -> Accuracy:
        entrant = Entrant(candidate, self.built(candidate))
        accuracy, failure = self._first(self._jobs.recheck, problem, entrant, timeout=PREPARE_SECONDS)
        return accuracy if failure is None else Accuracy(False, 0.0, 0.0, failure.detail)

    def _first(self, job: Callable[..., Any], *args: Any, timeout: float) -> tuple[Any, Outcome | None]:
        """A job on the first GPU, waited for, while the compilers are given what waits for them."""
        lane = self.lanes[0]
        return lane.attempt(lane.wait_for, job, *args, timeout=timeout, meanwhile=self.pool.poll)

    def close(self) -> None:
        super().close()
        for lane in self.lanes:
            lane.worker.terminate()  # all at once
        for lane in self.lanes:
            lane.end()
        self._nursery.close()
