"""Study: the search of one problem with one backend, as an Optuna study that a journal keeps, so that a kill loses nothing.

Ask and tell. Seeds come first, the default before all others; then, where the trials are enough for all feasible candidates,
all of them, else what ``proposals`` holds for the most promising. What is a candidate already seen is told its old outcome.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import filelock
import optuna
from optuna.trial import TrialState

from ..problem.op import Case, Config
from ..problem.values import describe
from .journal import Journal
from .outcome import Kind, Outcome
from .proposals import Proposals
from .shelf import Files, Shelf, begin
from .space import Candidate, Key, Space

_FREE_ASKS = 24  # repeated proposals in one ask: each takes the sampler about 10 ms
_STALE_S = 600.0  # a trial that another machine began so long ago is taken to be lost with it
FILES = Files()


class Study:
    """See the module's first lines.

    Args:
        case: what is timed; its sizes' bucket is what the study is for.
        folder: where the journals lie (``.tune/<gpu>``); the study goes on where an earlier run left it.
        method: how outcomes come about ("measured", "modelled"); outcomes of different methods never mix.
        trials: candidates to evaluate, in all runs together.
        seeds: configs to begin with, the default first.
        fresh: begin anew, whatever an earlier run found.
        lock: the journal's, where the caller holds it already; released by ``close``.
        shelf: where trials are kept; by default in a file below ``folder``.

    Raises:
        StudyBusy: another process has it open.
    """

    def __init__(
        self,
        space: Space,
        case: Case,
        folder: Path,
        *,
        method: str,
        trials: int,
        seeds: Sequence[Config],
        seed: int = 0,
        fresh: bool = False,
        lock: filelock.BaseFileLock | None = None,
        shelf: Shelf = FILES,
    ) -> None:
        self.space, self.case, self.trials = space, case, trials
        self.folder, self.method, self.seeds, self.seed = folder, method, tuple(seeds), seed
        self.counts: Counter[Kind] = Counter()
        self.first_failure: dict[Kind, str] = {}
        self.failed_trial: dict[Kind, int] = {}
        """The number of the trial that each of these first failures was."""
        self.seen: dict[Key, tuple[Candidate, Outcome]] = {}
        self.spent_s = 0.0
        self.failure = ""
        self._pending: dict[Key, optuna.Trial] = {}
        self._dry = False
        self._best: Outcome | None = None
        journal = Journal.of(space, case, folder, method)
        self.path = journal.path
        self._lock = lock or shelf.lock(journal)
        name = f"{self.label} {journal.digest}"
        if fresh:
            shelf.forget(journal, name)
        order = seed + int(journal.digest, 16) % 2**31
        self._proposals = Proposals(space, order, trials)
        self._study, self._shared = shelf.open(journal, name), shelf.shared
        self._noted: set[int] = set()
        self._study.set_user_attr("identity", journal.identity)
        self._study.set_user_attr("case", {"sizes": case.sizes.to_dict(), "distribution": case.distribution})
        self._restore()
        self._first: deque[Config] = deque()
        self.suggest(seeds)
        self.begun = not self._first
        """Whether the first seed, the default, was asked for; without it no find is known to be worth a record."""
        self._rest = self._everything(random.Random(order))

    @property
    def label(self) -> str:
        """For people: ``indexer.triton, queries 1025+``."""
        return f"{self.space.op.name}.{self.space.backend}, {describe(self.case.sizes.bucket())}"

    @property
    def evaluated(self) -> int:
        """Candidates evaluated or under way; infeasible and repeated proposals do not count."""
        return len(self.seen) + len(self._pending)

    @property
    def in_flight(self) -> int:
        """Candidates asked for and not told yet."""
        return len(self._pending)

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing more to ask for."""
        if self.evaluated >= self.trials or self.failure:
            return True
        return not (self._first or self._rest) if self._rest is not None else self._dry and not self._first

    @property
    def best(self) -> Outcome | None:
        """The fastest outcome so far."""
        return self._best

    def ask_for(self, config: Config) -> Candidate | None:
        """This config as a candidate to evaluate; None where it is infeasible or known, or the trials are spent."""
        if self.evaluated >= self.trials or self.failure or not self.space.fits(config):
            return None
        candidate = self.space.candidate(config)
        if self.knows(candidate.key):
            return None
        self._begin(candidate, self._enqueued(config))
        return candidate

    def ask(self) -> Candidate | None:
        """The next candidate to evaluate, or None where this ask found none (ask again unless ``exhausted``)."""
        if self._shared:
            self.catch_up()
        for _ in range(_FREE_ASKS):
            if self.exhausted:
                return None
            config = self._next()
            if config is None:
                return None
            trial = self._enqueued(config)
            candidate = self.space.candidate(config)
            if candidate.key in self._pending:
                # No outcome yet: FAIL is the one state that no sampler looks at.
                self._proposals.drop(candidate.config)
                self._study.tell(trial, state=TrialState.FAIL)
            elif candidate.key in self.seen:
                self._conclude(trial, candidate, self.seen[candidate.key][1])
            else:
                self._begin(candidate, trial)
                return candidate
        return None

    def tell(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Take a candidate's outcome; True where it is the fastest so far."""
        trial = self._pending.pop(candidate.key)
        if outcome.fatal:
            self.failure = outcome.detail
            self._study.tell(trial, state=TrialState.FAIL)
            return False
        self._conclude(trial, candidate, outcome)
        improved = self._note(candidate, outcome, trial.number)
        if improved:
            self._proposals.add(self.space.neighbours(candidate.config))  # those that a sample of a large space has left out
        return improved

    def reject(self, candidate: Candidate, outcome: Outcome) -> None:
        """Take back an OK that a later check does not bear out; for the journal that is one more trial."""
        self.counts[Kind.OK] -= 1
        trial = self._enqueued(candidate.config)
        self._note(candidate, outcome, trial.number)
        self._conclude(trial, candidate, outcome)

    def spread(self, count: int) -> list[Candidate]:
        """Candidates that lie apart, none of which is tried by that."""
        return [self.space.candidate(config) for config in self._proposals.spread(count)]

    def expect(self, times_us: Mapping[Config, float]) -> None:
        """What a ranking says of configs, where they fit; see ``Proposals.expect``."""
        self._proposals.expect({config: time_us for config, time_us in times_us.items() if self.space.fits(config)})

    def suggest(self, configs: Iterable[Config]) -> None:
        """Try these configs next: what another study of the same code has found."""
        fitting = filter(self.space.fits, configs)
        self._first.extend(config for config in fitting if not self.knows(self.space.candidate(config).key))

    def knows(self, key: Key) -> bool:
        """Whether the candidate was evaluated or is under way."""
        return key in self.seen or key in self._pending

    def outcome_of(self, config: Config) -> tuple[Candidate, Outcome] | None:
        """What became of a config, under whichever candidate it was seen; None where it was not or is another backend's."""
        if config.backend != self.space.backend:
            return None
        return self.seen.get(self.space.candidate(config).key)

    def lacks(self, config: Config) -> bool:
        """Whether a config of this backend that could be tried was not tried yet."""
        own = config.backend == self.space.backend and self.space.fits(config)
        return own and self.outcome_of(config) is None

    def fastest(self, count: int) -> list[tuple[Candidate, Outcome]]:
        """The fastest candidates, fully timed."""
        timed = [pair for pair in self.seen.values() if pair[1].ok and not pair[1].dominated]
        return sorted(timed, key=lambda pair: pair[1].time_us)[:count]

    def catch_up(self) -> None:
        """Take over what others have found since the last look."""
        self._restore(own=False)

    def close(self) -> None:
        """Give up what is under way (it is forgotten, not counted) and let other processes use the study."""
        for trial in self._pending.values():
            self._study.tell(trial, state=TrialState.FAIL)
        self._pending.clear()
        self._lock.release()

    def _begin(self, candidate: Candidate, trial: optuna.Trial) -> None:
        self._pending[candidate.key] = trial
        self._proposals.begin(candidate.config)

    def _next(self) -> Config | None:
        self.begun = self.begun or bool(self._first)
        queue = self._first or self._rest
        if queue or self._rest is not None:
            return queue.popleft() if queue else None
        config = self._proposals.next()
        self._dry = config is None
        return config

    def _enqueued(self, config: Config) -> optuna.Trial:
        """A trial of this config; the ranges never change, as Optuna requires."""
        return begin(self._study, self.space.encode(config), self.space.ranges)

    def _conclude(self, trial: optuna.Trial, candidate: Candidate, outcome: Outcome) -> None:
        self._noted.add(trial.number)
        self._proposals.learn(candidate.config, outcome.time_us if outcome.ok else None)
        trial.set_user_attr("outcome", outcome.to_json())
        if outcome.ok:
            self._study.tell(trial, outcome.time_us)
            return
        trial.set_constraint(outcome.kind.value, 1.0)
        self._study.tell(trial, state=TrialState.PRUNED)

    def _note(self, candidate: Candidate, outcome: Outcome, number: int) -> bool:
        self.seen[candidate.key] = (candidate, outcome)
        self.counts[outcome.kind] += 1
        if not outcome.ok:
            self.first_failure.setdefault(outcome.kind, f"{candidate.config}: {outcome.detail}")
            self.failed_trial.setdefault(outcome.kind, number)
            return False
        if self._best is None or outcome.time_us < self._best.time_us:
            self._best = outcome
            return True
        return False

    def _restore(self, own: bool = True) -> None:
        """Take over what earlier runs found, or other machines; trials that a dead run left open are released.

        Args:
            own: whether nobody else is at work on the study, or has begun what is open recently.
        """
        found: dict[Key, tuple[Candidate, Outcome, int]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number in self._noted:
                continue
            if trial.state is TrialState.RUNNING and own and not self._alive(trial):
                self._end(trial)
            if trial.state.is_finished() or "outcome" in trial.user_attrs:
                self._noted.add(trial.number)
                if "outcome" in trial.user_attrs:
                    candidate = self.space.candidate(self.space.decode(trial.params))
                    outcome = Outcome.from_json(trial.user_attrs["outcome"])
                    found[candidate.key] = candidate, outcome, trial.number  # the last word counts
        for candidate, outcome, number in found.values():
            self._note(candidate, outcome, number)
            self._proposals.learn(candidate.config, outcome.time_us if outcome.ok else None)

    def _end(self, trial: optuna.trial.FrozenTrial) -> None:
        """A dead run's trial: where it was killed between its last two lines, what came of it is known, and counts."""
        outcome = Outcome.from_json(trial.user_attrs["outcome"]) if "outcome" in trial.user_attrs else None
        if outcome is not None and outcome.ok:
            self._study.tell(trial.number, outcome.time_us)
        else:
            self._study.tell(trial.number, state=TrialState.PRUNED if outcome else TrialState.FAIL)

    def _alive(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether another machine may be at work on a trial."""
        begun = trial.datetime_start
        return self._shared and begun is not None and (datetime.now() - begun).total_seconds() < _STALE_S

    def _everything(self, order: random.Random) -> deque[Config] | None:
        """All candidates in a random order, one config each, where the trials are enough for them; else None."""
        configs = self.space.feasible()
        if configs is None or len(configs) > 2 * self.trials:  # so few of them render to the same source
            return None
        distinct = {candidate.key: candidate.config for candidate in map(self.space.candidate, configs)}
        if len(distinct) > self.trials:
            return None
        remaining = [config for key, config in distinct.items() if key not in self.seen]
        order.shuffle(remaining)
        return deque(remaining)
