"""Study: the search of one problem with one backend, as an Optuna study that a journal keeps, so that a kill loses nothing.

Ask and tell. What is infeasible is told with graded constraints and costs no time; what is a candidate already seen is told
its old outcome; seeds come first, then in turn a neighbour of the best and a proposal of the sampler, or, where the feasible
set is small enough, all of it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import filelock
import optuna
from optuna.trial import TrialState

from ..problem.op import Case, Config, Violation
from ..problem.values import describe
from .journal import Journal, open_study
from .lock import take
from .outcome import Kind, Outcome
from .space import Candidate, Key, Space

_FREE_ASKS = 24  # infeasible or repeated proposals in one ask: each takes the sampler about 10 ms
_CONVERGED = 20  # repeats in a row: the sampler has nothing new to say


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
    ) -> None:
        self.space, self.case, self.trials = space, case, trials
        self.counts: Counter[Kind] = Counter()
        self.first_failure: dict[Kind, str] = {}
        self.failed_trial: dict[Kind, int] = {}
        """The number of the trial that each of these first failures was."""
        self.seen: dict[Key, tuple[Candidate, Outcome]] = {}
        self.spent_s = 0.0
        self.failure = ""
        self._pending: dict[Key, optuna.Trial] = {}
        self._repeats = 0
        self._turn = 0
        self._best: Outcome | None = None
        journal = Journal.of(space, case, folder, method)
        self.path = journal.path
        self._lock = lock or take(self.path)
        if fresh:
            self.path.unlink(missing_ok=True)
        sampler_seed = seed + int(journal.digest, 16) % 2**31
        self._study = open_study(self.path, f"{self.label} {journal.digest}", sampler_seed, trials)
        self._study.set_user_attr("identity", journal.identity)
        self._study.set_user_attr("case", {"sizes": case.sizes.to_dict(), "distribution": case.distribution})
        self._restore()
        self._first: deque[Config] = deque()
        self.suggest(seeds)
        self.begun = not self._first
        """Whether the first seed, the default, was asked for; without it no find is known to be worth a record."""
        self._near: deque[Config] = deque()
        self._rest = self._everything(random.Random(sampler_seed))

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
        if self._rest is None:
            return self._repeats >= _CONVERGED
        return not (self._first or self._near or self._rest)

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
        self._study.enqueue_trial(self.space.encode(config))
        trial = self._study.ask()
        self.space.suggest(trial)
        self._pending[candidate.key] = trial
        return candidate

    def ask(self) -> Candidate | None:
        """The next candidate to evaluate, or None where this ask found none (ask again unless ``exhausted``)."""
        for _ in range(_FREE_ASKS):
            if self.exhausted:
                return None
            trial = self._next_trial()
            config = self.space.suggest(trial)
            violations = self.space.violations(config)
            if violations:
                self._refuse(trial, violations)
                continue
            candidate = self.space.candidate(config)
            if candidate.key in self._pending:
                # No outcome yet: FAIL is the one state that the sampler does not look at.
                self._study.tell(trial, state=TrialState.FAIL)
            elif candidate.key in self.seen:
                self._conclude(trial, self.seen[candidate.key][1])
            else:
                self._repeats = 0
                self._pending[candidate.key] = trial
                return candidate
            self._repeats += 1
        return None

    def tell(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Take a candidate's outcome; True where it is the fastest so far."""
        trial = self._pending.pop(candidate.key)
        if outcome.fatal:
            self.failure = outcome.detail
            self._study.tell(trial, state=TrialState.FAIL)
            return False
        self._conclude(trial, outcome)
        improved = self._note(candidate, outcome, trial.number)
        if improved:
            self._near.extendleft(self.space.neighbours(candidate.config))
        return improved

    def reject(self, candidate: Candidate, outcome: Outcome) -> None:
        """Take back an OK that a later check does not bear out; for the journal that is one more trial."""
        self.counts[Kind.OK] -= 1
        self._study.enqueue_trial(self.space.encode(candidate.config))
        trial = self._study.ask()
        self._note(candidate, outcome, trial.number)
        self.space.suggest(trial)
        self._conclude(trial, outcome)

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

    def close(self) -> None:
        """Give up what is under way (it is forgotten, not counted) and let other processes use the study."""
        for trial in self._pending.values():
            self._study.tell(trial, state=TrialState.FAIL)
        self._pending.clear()
        self._lock.release()

    def _next_trial(self) -> optuna.Trial:
        self._turn += 1
        if self._first:
            queue, self.begun = self._first, True
        elif self._near and (self._turn % 2 or self._rest == deque()):
            queue = self._near
        else:
            queue = self._rest or deque()
        if queue:
            self._study.enqueue_trial(self.space.encode(queue.popleft()))
        return self._study.ask()

    def _refuse(self, trial: optuna.Trial, violations: Sequence[Violation]) -> None:
        excess: dict[str, float] = {}
        for violation in violations:
            excess[violation.name] = max(violation.excess, excess.get(violation.name, 0.0))
        for name, value in excess.items():
            trial.set_constraint(name, value)
        self.counts[Kind.INFEASIBLE] += 1
        self._study.tell(trial, state=TrialState.PRUNED)

    def _conclude(self, trial: optuna.Trial, outcome: Outcome) -> None:
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

    def _restore(self) -> None:
        """Take over what earlier runs found; trials that a dead run left open are released, as the sampler avoids them."""
        found: dict[Key, tuple[Candidate, Outcome, int]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state is TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state.is_finished() and "outcome" in trial.user_attrs:
                candidate = self.space.candidate(self.space.decode(trial.params))
                outcome = Outcome.from_json(trial.user_attrs["outcome"])
                found[candidate.key] = candidate, outcome, trial.number  # the last word counts
            elif trial.state is TrialState.PRUNED:
                self.counts[Kind.INFEASIBLE] += 1
        for each in found.values():
            self._note(*each)

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
