"""Results: from the fastest candidates of a problem to its records, one per backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..problem.op import Config
from ..records.record import Record
from .evaluate import Evaluator
from .field import Contender, record_of, timed_in_turns, winner_of
from .outcome import Kind, Outcome
from .problem import Problem
from .space import Candidate
from .study import Study

FINALISTS = 8  # of all backends together, the default not counted


@dataclass(frozen=True)
class Found(Contender):
    """A contender that a study has found."""

    study: Study


def contenders(studies: Sequence[Study], default: Config) -> list[Found]:
    """The fastest of each backend of a problem, and the default wherever it ran."""
    each = max(2, FINALISTS // max(len(studies), 1))
    found = []
    for study in studies:
        known = study.outcome_of(default)
        fastest = {candidate.key: (candidate, outcome) for candidate, outcome in study.fastest(each)}
        if known is not None and known[1].ok:
            fastest.setdefault(known[0].key, known)
        found += [Found(*pair, default=pair == known, study=study) for pair in fastest.values()]
    return found


def settle(
    problem: Problem,
    studies: Sequence[Study],
    default: Config,
    evaluator: Evaluator | None,
    *,
    seed: int,
    limit_s: float = 2.0,
) -> list[tuple[Record, Candidate]]:
    """The records of a problem, one per backend that has a correct candidate, and the candidates that won.

    Args:
        evaluator: holds the final on its GPU; None (an interrupted run) and a model leave the search's times as they are.
    """
    if any(study.lacks(default) for study in studies):
        return []  # the default was not tried yet: nothing is known to be better
    field = contenders(studies, default)
    final = False
    if evaluator is not None and evaluator.measures:
        field, final = timed_in_turns(problem, field, evaluator, limit_s)
    default_us = min((each.outcome.time_us for each in field if each.default), default=None)
    settled = []
    for study in studies:
        own = [each for each in field if each.study is study]
        winner = winner_of(problem, own, evaluator, _reject)
        if winner is not None:
            search = _search(study, seed, final)
            settled.append((record_of(problem, winner, own, default_us, search), winner.candidate))
    return settled


def _reject(found: Found, outcome: Outcome) -> None:
    found.study.reject(found.candidate, outcome)


def _search(study: Study, seed: int, final: bool) -> dict[str, float]:
    counts = {kind.value: study.counts[kind] for kind in Kind if study.counts[kind]}
    return {"trials": len(study.seen), **counts, "final": int(final), "wall_s": round(study.spent_s, 1), "seed": seed}
