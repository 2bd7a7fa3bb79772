"""Search: keeps the compilers and the GPU busy with candidates of many studies, each given an equal share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from . import ranking
from .account import Account
from .evaluate import Done, Evaluator
from .problem import Problem
from .space import Candidate, Space
from .study import Study

_IDLE_SECONDS = 0.005
_ASKS_PER_TURN = 4  # that find nothing; after one that does GPUs are looked at: an ask takes 15 ms and more, judging 200
_IN_FLIGHT = 4  # candidates of a study, for each GPU; with 18 on one, searches of 541 configs lost 3 % more
_SCREENED = 24  # candidates that are compiled to be ranked, where that is known to say something
_AHEAD = 4  # candidates compiled, for each GPU, beyond what the processes work on


@dataclass
class _Screen:
    """Studies of one code, and the candidates that are compiled to know more of all before they are timed."""

    studies: list[Study]
    candidates: list[Candidate] | None = None


class Search:
    """One run over several studies.

    Args:
        studies: by the problem they are of; studies of one operation, spec and backend share compilations and finds.
        on_change: called after every outcome and a few times a second.
        clock: what the deadline is read from.
    """

    def __init__(
        self,
        studies: Mapping[Study, Problem],
        evaluator: Evaluator,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._problems, self._evaluator, self._on_change, self._clock = studies, evaluator, on_change, clock
        self._told, self._asked, self._asking_s = 0.0, 0, 0.0
        self._by_space: dict[Space, list[Study]] = {}
        for study in studies:
            self._by_space.setdefault(study.space, []).append(study)
        self._screens = list(self._of_one_code()) if evaluator.measures else []

    def run(self, deadline: float) -> None:
        """Search until every study is exhausted or the clock passes the deadline."""
        self._evaluator.begin()
        while self._clock() < deadline:
            asked = self._feed()
            self._screens = [screen for screen in self._screens if not self._ended(screen)]
            done = self._evaluator.poll()
            for each in done:
                self._take(each)
            if not asked and not done:
                if not self._evaluator.backlog and all(study.exhausted for study in self._problems):
                    return
                time.sleep(_IDLE_SECONDS)
            self._tell(bool(done))
        self._evaluator.cancel()
        while self._evaluator.backlog:  # what the GPU is at: bounded by its deadline
            for each in self._evaluator.poll():
                self._take(each)
            time.sleep(_IDLE_SECONDS)

    def account(self, wall_s: float) -> Account:
        """What was done with the seconds of a search that took so long."""
        pool, gpus = self._evaluator.pool, self._evaluator.spent
        spent, judged = [seconds for seconds, _ in gpus], [count for _, count in gpus]
        return Account(wall_s, spent, judged, pool.size, pool.busy_s, self._asked, self._asking_s)

    def _feed(self) -> bool:
        """Ask for a candidate where there is room for one; whether there is a new one."""
        for _ in range(_ASKS_PER_TURN):
            if self._evaluator.backlog >= self._evaluator.pool.size + _AHEAD * self._evaluator.width:
                break
            study = self._neediest()
            if study is None:
                break
            begun = time.monotonic()
            candidate = study.ask()
            took = time.monotonic() - begun
            self._asked, self._asking_s = self._asked + 1, self._asking_s + took
            study.spent_s += took  # a space that is mostly infeasible must not hold up the others
            if self._submit(study, candidate):
                return True
        return False

    def _of_one_code(self) -> Iterator[_Screen]:
        """The studies that begin, have trials for it, and whose candidates can be ranked by their machine code."""
        groups: dict[Space, list[Study]] = {}
        for study in self._problems:
            if study.trials >= _SCREENED > len(study.seen) and ranking.is_calibrated(study.space.op.name, study.space.backend):
                groups.setdefault(replace(study.space, bucket=None), []).append(study)
        yield from map(_Screen, groups.values())

    def _ended(self, screen: _Screen) -> bool:
        """Compile candidates that lie apart; once all are, the studies expect of them what the ranking says."""
        if screen.candidates is None:
            if screen.studies[0].evaluated < _IN_FLIGHT and not screen.studies[0].exhausted:
                return False  # the first that are tried at once lie apart as well; what is compiled lies apart from them
            screen.candidates = screen.studies[0].spread(_SCREENED)
            for candidate in screen.candidates:
                self._evaluator.pool.request(candidate.rendered)
        if not all(map(self._evaluator.compiled, screen.candidates)):
            return False
        for study in screen.studies:
            problem, default = self._problems[study], self._default_of(study)
            served = [each for each in screen.candidates if study.space.fits(each.config)]  # they are spread over one's sizes
            built = [each for each in (*default, *served) if self._evaluator.is_built(each)]
            study.expect({each.config: self._evaluator.estimate_us(problem, each) for each in built})
        return True

    def _default_of(self, study: Study) -> list[Candidate]:
        return [study.space.candidate(config) for config in study.seeds[:1] if study.space.fits(config)]

    def _submit(self, study: Study, candidate: Candidate | None) -> bool:
        if candidate is not None:
            self._evaluator.submit(study, self._problems[study], candidate)
        return candidate is not None

    def _neediest(self) -> Study | None:
        """The study to ask next: one that has not tried its default, else the one that has had the least time."""
        most = math.inf if self._evaluator.free else _IN_FLIGHT * self._evaluator.width
        open_studies = [study for study in self._problems if not study.exhausted and study.in_flight < most]
        return min(open_studies, key=lambda study: (study.begun, self._claim(study), study.evaluated), default=None)

    def _claim(self, study: Study) -> float:
        """Seconds that a study has had and will probably have for what is under way.

        Where judging is free only compiling takes time, and that serves all studies of the same code alike.
        """
        sharing = [study, *self._siblings(study)] if self._evaluator.free else [study]
        spent = sum(each.spent_s for each in sharing)
        typical = spent / max(sum(len(each.seen) for each in sharing), 1) or 1.0
        return spent + typical * sum(each.in_flight for each in sharing)

    def _take(self, done: Done) -> None:
        study, candidate = done.task.study, done.task.candidate
        study.spent_s += done.seconds
        improved = study.tell(candidate, done.outcome)
        for sibling in self._siblings(study):
            if self._evaluator.free:
                self._submit(sibling, sibling.ask_for(candidate.config))
            elif improved:
                sibling.suggest([candidate.config])

    def _siblings(self, study: Study) -> Sequence[Study]:
        return [other for other in self._by_space[study.space] if other is not study]

    def _tell(self, changed: bool) -> None:
        now = time.monotonic()
        if changed or now - self._told > 0.25:
            self._told = now
            self._on_change()
