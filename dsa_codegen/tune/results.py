"""Results: from the fastest candidates of a problem to its records, one per backend."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..kernels.render import template_name, template_sha
from ..kernels.toolchain import versions
from ..problem.op import Accuracy, Config
from ..records.record import MEASURED, MODELLED, GpuKey, Record, RunnerUp
from .evaluate import Evaluator
from .finals import Finalist, choose
from .outcome import Kind, Outcome
from .problem import Problem
from .space import Candidate
from .study import Study

FINALISTS = 8  # of all backends together, the default not counted
_RUNNERS_UP = 5


@dataclass(frozen=True)
class Contender:
    """A candidate that reached the final, with the search's outcome and, once it is over, the final's."""

    study: Study
    candidate: Candidate
    outcome: Outcome
    default: bool

    @property
    def finalist(self) -> Finalist:
        """What the choice looks at."""
        assert self.outcome.timing is not None
        return Finalist(self.candidate.config, self.outcome.timing, self.outcome.smem, self.default)


def contenders(studies: Sequence[Study], default: Config) -> list[Contender]:
    """The fastest of each backend of a problem, and the default wherever it ran."""
    each = max(2, FINALISTS // max(len(studies), 1))
    found = []
    for study in studies:
        known = study.outcome_of(default)
        fastest = {candidate.key: (candidate, outcome) for candidate, outcome in study.fastest(each)}
        if known is not None and known[1].ok:
            fastest.setdefault(known[0].key, known)
        found += [Contender(study, *pair, default=pair == known) for pair in fastest.values()]
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
        field, final = _final(problem, field, evaluator, limit_s)
    default_us = min((each.outcome.time_us for each in field if each.default), default=None)
    settled = []
    for study in studies:
        own = [each for each in field if each.study is study]
        winner = _winner(problem, own, evaluator)
        if winner is not None:
            search = _search(study, seed, final)
            settled.append((_record(problem, winner, own, default_us, search), winner.candidate))
    return settled


def _final(problem: Problem, field: list[Contender], evaluator: Evaluator, limit_s: float) -> tuple[list[Contender], bool]:
    """The contenders with the times they took in turns, and whether there was such a final."""
    field = [each for each in field if evaluator.is_built(each.candidate)]
    measured = evaluator.final(problem, [each.candidate for each in field], limit_s) if field else None
    if measured is None:
        return field, False
    timed = [
        replace(each, outcome=replace(each.outcome, timing=time.timing, policy=time.policy))
        for each, time in zip(field, measured, strict=True)
    ]
    return timed, True


def _winner(problem: Problem, field: Sequence[Contender], evaluator: Evaluator | None) -> Contender | None:
    """The choice among a backend's contenders; one that fails its last check is struck off."""
    remaining = list(field)
    while remaining:
        by_config = {each.candidate.config: each for each in remaining}
        winner = by_config[choose([each.finalist for each in remaining]).config]
        if evaluator is None:
            return winner
        accuracy = evaluator.recheck(problem, winner.candidate)
        if accuracy.passed:
            return winner
        remaining.remove(winner)
        winner.study.reject(winner.candidate, Outcome(Kind.MISMATCH, accuracy=accuracy, detail=accuracy.detail))
    return None


def _record(
    problem: Problem, winner: Contender, field: Sequence[Contender], default_us: float | None, search: Mapping[str, float]
) -> Record:
    op, spec, case = problem.op, problem.spec, problem.case
    config, outcome = winner.candidate.config, winner.outcome
    assert outcome.timing is not None
    others = sorted((each for each in field if each is not winner), key=lambda each: each.outcome.time_us)
    return Record(
        op=op.name,
        gpu=GpuKey.of(problem.gpu),
        backend=config.backend,
        spec=spec.to_dict(),
        bucket=case.sizes.bucket(),
        config=config.to_dict(),
        evidence=MEASURED if outcome.policy else MODELLED,
        time_us=outcome.timing,
        default_time_us=default_us,
        limit_us=op.cost(spec, case).limit_us(problem.gpu),
        sizes={name: int(value) for name, value in case.sizes.to_dict().items()},
        distribution=case.distribution,
        template=template_sha(template_name(op, config.backend)),
        source_sha=winner.candidate.rendered.sha,
        toolchain=versions(config.backend),
        policy=outcome.policy,
        accuracy=_accuracy(outcome.accuracy),
        search=search,
        runners_up=tuple(RunnerUp(each.candidate.config.to_dict(), each.outcome.time_us) for each in others[:_RUNNERS_UP]),
        measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _accuracy(accuracy: Accuracy | None) -> dict[str, float] | None:
    return {"max_abs": accuracy.max_abs, "similarity": accuracy.similarity} if accuracy else None


def _search(study: Study, seed: int, final: bool) -> dict[str, float]:
    counts = {kind.value: study.counts[kind] for kind in Kind if study.counts[kind]}
    return {"trials": len(study.seen), **counts, "final": int(final), "wall_s": round(study.spent_s, 1), "seed": seed}
