"""Evaluate: candidates in, outcomes out; what all ways of judging a candidate share is that it is compiled first, in a pool."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from ..kernels.build import Built
from ..problem.op import Accuracy
from ..proof.measure import Measured
from ..proof.timing import Timing
from . import ranking
from .outcome import Kind, Outcome
from .pool import CompilePool
from .problem import Problem
from .space import Candidate
from .study import Study

_IDLE_SECONDS = 0.02


@dataclass(frozen=True)
class Task:
    """A candidate that a study asked about."""

    study: Study
    problem: Problem
    candidate: Candidate
    charged: bool
    """Whether the study pays for the compilation; the first that asks does."""


@dataclass(frozen=True)
class Done:
    """What became of a task, and the seconds that its study is charged for it."""

    task: Task
    outcome: Outcome
    seconds: float


class Evaluator(ABC):
    """Compiles, then lets ``_advance`` judge what was built."""

    method: str
    """The name of how outcomes come about; studies keep those of different methods apart."""
    search_share: float
    """Share of the budget that the search may use; the finals get the rest."""
    measures: bool
    """Whether outcomes come of running; then there is a final, and winners are checked once more."""
    free: bool
    """Whether judging a build costs next to nothing, so that every study of the same code should see every build."""

    def __init__(self, pool: CompilePool) -> None:
        self.pool = pool
        self._compiling: list[Task] = []
        self._ready: list[Task] = []

    @property
    def width(self) -> int:
        """Candidates that are judged at once."""
        return 1

    @property
    def backlog(self) -> int:
        """Tasks that are not done."""
        return len(self._compiling) + len(self._ready)

    @property
    def spent(self) -> Sequence[tuple[Mapping[str, float], int]]:
        """What each GPU did since ``begin``: seconds by activity, and how many candidates it judged."""
        return []

    def begin(self) -> None:
        """A search begins."""
        return

    def submit(self, study: Study, problem: Problem, candidate: Candidate) -> None:
        """Begin with a candidate; what a study tries first, its default, is compiled first."""
        charged = self.pool.request(candidate.rendered, not study.seen)
        self._compiling.append(Task(study, problem, candidate, charged))

    def poll(self) -> list[Done]:
        """Whatever is done since the last call; never waits."""
        self.pool.poll()
        done, waiting = [], []
        for task in self._compiling:
            result = self.pool.results.get(task.candidate.rendered.sha)
            if result is None:
                waiting.append(task)
            elif isinstance(result, Outcome):
                done.append(Done(task, result, self._compile_cost(task)))
            else:
                self._ready.append(task)
        self._compiling = waiting
        return [*done, *self._advance()]

    def estimate_us(self, problem: Problem, candidate: Candidate) -> float:
        """Microseconds that a built candidate would take, by its machine code."""
        op, spec, case, gpu = problem.op, problem.spec, problem.case, problem.gpu
        return ranking.estimate_us(op, spec, candidate.config, case, gpu, self.built(candidate))

    def finish_builds(self, candidates: Sequence[Candidate], tell: Callable[[], None] = lambda: None) -> None:
        """Have these compiled, whatever else the compilers are at; the host is quiet after it."""
        self.pool.keep_only([each.rendered for each in candidates])
        for each in candidates:
            self.pool.request(each.rendered)
        while not all(map(self.compiled, candidates)):
            self.pool.poll()
            tell()
            self._idle()

    def _idle(self) -> None:
        time.sleep(_IDLE_SECONDS)

    def cancel(self) -> None:
        """Drop every task that the GPU has not begun."""
        self.pool.cancel()
        self._compiling.clear()
        self._ready.clear()

    def set_up(self, problem: Problem, backend: str) -> str:
        """Make a problem's inputs; why that failed, whatever the candidates are, or nothing."""
        return ""

    def gate(self, problem: Problem, candidate: Candidate) -> Outcome:
        """Whether a built candidate is right, on the small cases and on the workload; it is not timed."""
        return Outcome(Kind.OK)

    def final(self, problem: Problem, candidates: Sequence[Candidate], limit_s: float) -> list[Measured] | None:
        """Time candidates in turns, for about ``limit_s`` seconds; None where that failed or nothing is measured."""
        return None

    def eager(self, problem: Problem, candidates: Sequence[Candidate]) -> list[Timing]:
        """Candidates launched one by one, in turns; none where that failed or nothing is measured."""
        return []

    @property
    def card(self) -> str:
        """The name of the board that the finals run on; empty where there is none."""
        return ""

    def recheck(self, problem: Problem, candidate: Candidate) -> Accuracy:
        """The winner once more on the full workload."""
        return Accuracy(True, 0.0, 0.0)

    def close(self) -> None:
        """End whatever runs."""
        self.cancel()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _advance(self) -> list[Done]:
        """Judge what is ready, without waiting."""

    def is_built(self, candidate: Candidate) -> bool:
        """Whether there is a build of the candidate."""
        return isinstance(self.pool.results.get(candidate.rendered.sha), Built)

    def compiled(self, candidate: Candidate) -> bool:
        """Whether the compilers are done with the candidate, for better or worse."""
        return candidate.rendered.sha in self.pool.results

    def failure(self, candidate: Candidate) -> Outcome | None:
        """Why there is no build of a candidate that the compilers are done with; None where there is one."""
        result = self.pool.results.get(candidate.rendered.sha)
        return result if isinstance(result, Outcome) else None

    def built(self, candidate: Candidate) -> Built:
        """The build of a candidate that compiled."""
        built = self.pool.results[candidate.rendered.sha]
        assert isinstance(built, Built)
        return built

    def _compile_cost(self, task: Task) -> float:
        return self.pool.seconds.get(task.candidate.rendered.sha, 0.0) / self.pool.size if task.charged else 0.0
