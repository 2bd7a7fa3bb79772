"""Results: from the fastest candidates of a problem to its records, one per backend; none gives way to a slower one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..problem.op import Config
from ..records.record import Record
from .evaluate import Evaluator
from .field import Contender, record_of, timed_in_turns, winner_of
from .incumbent import Change, Incumbent
from .outcome import Kind, Outcome
from .problem import Problem
from .space import Candidate
from .study import Study

_NONE: Mapping[str, Incumbent] = {}
FINALISTS = 8  # of all backends together, the default not counted


@dataclass(frozen=True)
class Found(Contender):
    """A contender that a study has found."""

    study: Study = field(kw_only=True)


@dataclass(frozen=True)
class Settled:
    """A record to be written, the candidate that won it, and what it replaces."""

    record: Record
    candidate: Candidate
    change: Change


def contenders(studies: Sequence[Study], default: Config, serving: Mapping[str, Incumbent] = _NONE) -> list[Found]:
    """The fastest of each backend of a problem, and wherever they ran the default and what serves today."""
    each = max(2, FINALISTS // max(len(studies), 1))
    found = []
    for study in studies:
        fastest = {candidate.key: (candidate, outcome) for candidate, outcome in study.fastest(each)}
        known, held = study.outcome_of(default), _outcome_of(study, serving)
        for pair in (known, held):
            if pair is not None and pair[1].ok:
                fastest.setdefault(pair[0].key, pair)
        found += [Found(*pair, pair == known, pair == held, study=study) for pair in fastest.values()]
    return found


def _outcome_of(study: Study, serving: Mapping[str, Incumbent]) -> tuple[Candidate, Outcome] | None:
    incumbent = serving.get(study.space.backend)
    return study.outcome_of(incumbent.config) if incumbent else None


def settle(
    problem: Problem,
    studies: Sequence[Study],
    default: Config,
    evaluator: Evaluator | None,
    *,
    seed: int,
    limit_s: float = 2.0,
    serving: Mapping[str, Incumbent] = _NONE,
) -> list[Settled]:
    """The records of a problem, one per backend that has a correct candidate.

    Args:
        evaluator: holds the final on its GPU; None (an interrupted run) and a model leave the search's times as they are.
        serving: by backend what serves today. It stays as it is where the candidates could not be timed beside it.
    """
    if any(study.lacks(default) for study in studies):
        return []  # the default was not tried yet: nothing is known to be better
    field = contenders(studies, default, serving)
    final = False
    if evaluator is not None and evaluator.measures:
        field, final = timed_in_turns(problem, field, evaluator, limit_s)
    default_us = min((each.outcome.time_us for each in field if each.default), default=None)
    settled = []
    for study in studies:
        own = [each for each in field if each.study is study]
        incumbent = serving.get(study.space.backend)
        if incumbent and (not final or study.lacks(incumbent.config)):
            continue
        winner = winner_of(problem, own, evaluator, _reject)
        if winner is not None:
            card = evaluator.card if evaluator is not None else ""
            record = record_of(problem, winner, own, default, default_us, _search(study, seed, final), card)
            settled.append(Settled(record, winner.candidate, _change(record, incumbent, own, study)))
    return settled


def _change(record: Record, incumbent: Incumbent | None, field: Sequence[Found], study: Study) -> Change:
    if incumbent is None:
        return Change(record)
    beside = next((each.outcome.time_us for each in field if each.standing), None)
    known = study.outcome_of(incumbent.config)
    why = "" if known is None or known[1].ok else f"{known[1].kind.value}: {known[1].detail}"
    return Change(record, incumbent.record, beside, why, kept=incumbent.config.to_dict() == dict(record.config))


def _reject(found: Found, outcome: Outcome) -> None:
    found.study.reject(found.candidate, outcome)


def _search(study: Study, seed: int, final: bool) -> dict[str, float]:
    counts = {kind.value: study.counts[kind] for kind in Kind if study.counts[kind]}
    return {"trials": len(study.seen), **counts, "final": int(final), "wall_s": round(study.spent_s, 1), "seed": seed}
