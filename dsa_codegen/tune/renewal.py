"""Renewal: one problem's records against the default, on the GPU: gate, final, last check; what becomes of each record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import NoConfig
from ..gpu import Gpu
from ..problem.op import Config
from ..problem.values import contains
from ..proof.timing import Timing
from ..records.lookup import missing_tool
from ..records.record import Record
from .evaluate import Evaluator
from .field import Contender, record_of, timed_in_turns, winner_of
from .keep import keep
from .outcome import Kind, Outcome
from .problem import Problem
from .space import Candidate, Space
from .standing import Standing

FINAL_SECONDS = 1.0  # of device time for a problem; its contenders are two to four
# What a config cannot help doing again; other failures (a process that died, a device out of memory) may be the machine's.
_DECIDED = (Kind.INFEASIBLE, Kind.COMPILE_ERROR, Kind.MISMATCH)


@dataclass(frozen=True)
class Fate:
    """What became of a record, or of a default that got one."""

    old: Record | None
    what: str
    """"refreshed", "default" (which took its place), "carried" (its code is the same), "added", "dropped" or "left"."""
    why: str
    now: Record | None = None


@dataclass(frozen=True)
class Task:
    """The records of one problem, of one or more backends, and what is to be timed."""

    problem: Problem
    old: tuple[Record, ...]
    shipped: tuple[Candidate | str, ...]
    """For each record its candidate, or why its config is none any more."""
    defaults: tuple[Candidate, ...]
    """Each backend's; the problem's own, which the dispatcher would use untuned, comes first."""

    @property
    def candidates(self) -> list[Candidate]:
        """All that have to be built, each once."""
        every = (*(each for each in self.shipped if isinstance(each, Candidate)), *self.defaults)
        return list({each.key: each for each in every}.values())


def task_of(states: Sequence[Standing], gpu: Gpu) -> Task:
    """What has to be timed for records of one problem."""
    problem = states[0].problem(gpu)
    assert problem is not None, "a record that states no problem has no task"
    shipped = tuple(_shipped(problem, state) for state in states)
    recorded = dict.fromkeys(state.record.backend for state in states)
    backends = ["", *(backend for backend in recorded if backend in problem.op.backends)]
    defaults = {each.key: each for backend in backends for each in _default(problem, backend)}
    return Task(problem, tuple(state.record for state in states), shipped, tuple(defaults.values()))


def _shipped(problem: Problem, state: Standing) -> Candidate | str:
    if state.config is None:
        return state.reason
    broken = problem.op.violations(problem.spec, state.config, problem.gpu, problem.case.sizes.bucket())
    if broken:
        return "; ".join(violation.reason for violation in broken)
    return _candidate(problem, state.config)


def _default(problem: Problem, backend: str) -> Iterable[Candidate]:
    try:
        config = problem.op.default_config(problem.spec, problem.case.sizes, problem.gpu, backend)
    except NoConfig:
        return
    if not missing_tool(config.backend):
        yield _candidate(problem, config)


def _candidate(problem: Problem, config: Config) -> Candidate:
    return Space(problem.op, problem.spec, config.backend, problem.gpu).candidate(config)


def renew(task: Task, evaluator: Evaluator, drop: bool = False, limit_s: float = FINAL_SECONDS) -> list[Fate]:
    """Check and time the records' configs and the defaults; every candidate is compiled, or has failed to.

    Args:
        drop: also drop a record whose failure may have been the machine's.
    """
    problem = task.problem
    trouble = evaluator.set_up(problem, task.old[0].backend)
    if trouble:
        return [Fate(old, "left", f"the problem cannot be set up: {trouble}") for old in task.old]
    contest = Contest(task, evaluator)
    if not contest.hold(limit_s):
        return [Fate(old, "left", "the final failed") for old in task.old]
    fates = [contest.fate(old, shipped, drop) for old, shipped in zip(task.old, task.shipped, strict=True)]
    return fates + contest.addition()


class Contest:
    """The gate and the final of one task, and the winners by backend."""

    def __init__(self, task: Task, evaluator: Evaluator) -> None:
        self._task, self._evaluator, self._problem = task, evaluator, task.problem
        self._failures: dict[tuple[object, ...], Outcome] = {}
        self._field: list[Contender] = []
        self._winners: dict[str, Contender | None] = {}

    def hold(self, limit_s: float) -> bool:
        """Gate all, time what is right in turns; False where that timing failed."""
        defaults = {each.key for each in self._task.defaults}
        right = []
        for candidate in self._task.candidates:
            outcome = self._evaluator.failure(candidate) or self._evaluator.gate(self._problem, candidate)
            if outcome.ok:
                right.append(Contender(candidate, outcome, candidate.key in defaults))
            else:
                self._failures[candidate.key] = outcome
        self._field, timed = timed_in_turns(self._problem, right, self._evaluator, limit_s)
        return timed or not right

    def fate(self, old: Record, shipped: Candidate | str, drop: bool) -> Fate:
        """What becomes of a record: it or the default of its backend is written anew, or nothing of it remains."""
        winner = self._winner(old.backend)
        said = self.verdict(shipped)
        if winner is None:
            outcomes = [self._failures[each.key] for each in self._task.candidates if each.config.backend == old.backend]
            final = drop or all(outcome.kind in _DECIDED for outcome in outcomes)
            return Fate(old, "dropped" if final else "left", said)
        if isinstance(shipped, Candidate) and winner.candidate.key == shipped.key:
            search = {**old.search, "refreshed": old.search.get("refreshed", 0) + 1}
            return Fate(old, "refreshed", "", self._serving(old, self._record(winner, search)))
        fresh = self._serving(old, self._record(winner, {"final": 1, "refreshed": 1}))
        return Fate(old, "default", said or self._slower(shipped, winner), fresh)

    def _serving(self, old: Record, fresh: Record) -> Record:
        """The fresh record with the old one's bucket, where that holds more: other calls are served by it."""
        problem = self._problem
        reached = not list(problem.op.reach(problem.spec, fresh.config_for(problem.op), old.bucket))
        return replace(fresh, bucket=old.bucket) if reached and contains(old.bucket, fresh.bucket) else fresh

    def addition(self) -> list[Fate]:
        """The default, where it is of a backend without a record and faster than all that have one."""
        default = self._default
        if default is None or default.config.backend in {old.backend for old in self._task.old}:
            return []
        winner = self._winner(default.config.backend)
        others = [each.outcome.time_us for backend, each in self._winners.items() if each and each is not winner]
        if winner is None or min(others, default=float("inf")) <= winner.outcome.time_us:
            return []
        why = "faster than every config that was recorded" if others else "nothing that was recorded is right any more"
        return [Fate(None, "added", why, self._record(winner, {"final": 1, "refreshed": 1}))]

    def _winner(self, backend: str) -> Contender | None:
        if backend not in self._winners:
            own = self._of(backend)
            self._winners[backend] = found = winner_of(self._problem, own, self._evaluator, self._reject)
            if found is not None:
                keep(self._evaluator.built(found.candidate))
        return self._winners[backend]

    def _reject(self, contender: Contender, outcome: Outcome) -> None:
        self._failures[contender.candidate.key] = outcome
        self._field.remove(contender)

    def _of(self, backend: str) -> list[Contender]:
        return [each for each in self._field if each.candidate.config.backend == backend]

    def verdict(self, shipped: Candidate | str) -> str:
        """Why the record's config is out; empty where it is right."""
        if isinstance(shipped, str):
            return shipped
        failure = self._failures.get(shipped.key)
        return f"{failure.kind.value}: {failure.detail}" if failure else ""

    def time_of(self, shipped: Candidate | str) -> Timing | None:
        """What a record's config took; None where it did not reach the end."""
        if isinstance(shipped, str):
            return None
        return next((each.outcome.timing for each in self._field if each.candidate.key == shipped.key), None)

    @property
    def default_us(self) -> float | None:
        """What the problem's own default took; None where it did not reach the end."""
        timing = self.time_of(self._default) if self._default is not None else None
        return timing.median if timing else None

    @property
    def _default(self) -> Candidate | None:
        return next(iter(self._task.defaults), None)

    def is_default(self, shipped: Candidate | str) -> bool:
        """Whether a record states the problem's own default."""
        return isinstance(shipped, Candidate) and [shipped.key] == [each.key for each in self._task.defaults[:1]]

    def _slower(self, shipped: Candidate | str, winner: Contender) -> str:
        (took,) = (each.outcome.time_us for each in self._field if each.candidate is shipped)
        return f"{took:.1f} µs against the default's {winner.outcome.time_us:.1f}"

    def _record(self, winner: Contender, search: dict[str, float]) -> Record:
        own = self._of(winner.candidate.config.backend)
        default = self._default.config if self._default is not None else None
        return record_of(self._problem, winner, own, default, self.default_us, search, self._evaluator.card)
