"""Field: the candidates that reached a problem's final, timed in turns, the winner checked once more, and its record."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..kernels.render import template_name, template_sha
from ..kernels.toolchain import versions
from ..problem.op import Accuracy, Config
from ..proof.timing import Timing
from ..records.default import default_sha
from ..records.record import MEASURED, MODELLED, GpuKey, Record, RunnerUp
from .evaluate import Evaluator
from .finals import Finalist, choose
from .outcome import Kind, Outcome
from .problem import Problem
from .space import Candidate

_RUNNERS_UP = 5
_EAGER = 3  # of a final also launched one by one
_LONG_US = 500.0  # launching takes 5 to 20 us: of a longer kernel it says nothing
EAGER_DIFFERS = 0.1  # relative; below it the two say the same


@dataclass(frozen=True)
class Contender:
    """A candidate that reached the final, with the outcome so far and, once it is over, the final's."""

    candidate: Candidate
    outcome: Outcome
    default: bool
    standing: bool = False
    """Whether a record of it serves today."""
    eager: Timing | None = None
    """Launched one by one, where that was timed."""

    @property
    def finalist(self) -> Finalist:
        """What the choice looks at."""
        assert self.outcome.timing is not None
        return Finalist(self.candidate.config, self.outcome.timing, self.outcome.smem, self.default, self.standing)


C = TypeVar("C", bound=Contender)


def timed_in_turns(problem: Problem, field: Sequence[C], evaluator: Evaluator, limit_s: float) -> tuple[list[C], bool]:
    """The contenders that are built, with the times they took in turns, and whether there was such a final."""
    field = [each for each in field if evaluator.is_built(each.candidate)]
    measured = evaluator.final(problem, [each.candidate for each in field], limit_s) if field else None
    if measured is None:
        return field, False
    timed = [
        replace(each, outcome=replace(each.outcome, timing=time.timing, policy=time.policy))
        for each, time in zip(field, measured, strict=True)
    ]
    return _also_eager(problem, timed, evaluator), True


def _also_eager(problem: Problem, field: list[C], evaluator: Evaluator) -> list[C]:
    """The fastest few and the default also launched one by one."""
    ranked = sorted(field, key=lambda each: (each.outcome.time_us, not each.default))
    if not ranked or ranked[0].outcome.time_us > _LONG_US:
        return field
    chosen = [each for each in ranked if each in ranked[:_EAGER] or each.default]
    times = evaluator.eager(problem, [each.candidate for each in chosen])
    by_key = {each.candidate.key: time for each, time in zip(chosen, times, strict=False)}
    return [replace(each, eager=by_key.get(each.candidate.key)) for each in field]


def winner_of(
    problem: Problem, field: Sequence[C], evaluator: Evaluator | None, reject: Callable[[C, Outcome], None]
) -> C | None:
    """The choice among a backend's contenders; one that fails its last check is struck off, and ``reject`` is told."""
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
        reject(winner, Outcome(Kind.MISMATCH, accuracy=accuracy, detail=accuracy.detail))
    return None


def record_of(
    problem: Problem,
    winner: Contender,
    field: Sequence[Contender],
    default: Config | None,
    default_us: float | None,
    search: Mapping[str, float],
    card: str = "",
) -> Record:
    """The winner's record.

    Args:
        field: all contenders of its backend, from which the runners-up come.
        default, default_us: what serves untuned, and its time beside the winner's where it has one.
    """
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
        default_sha=default_sha(op, spec, default),
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
        card=card,
        eager_us=winner.eager if winner.eager is not None and disagree(outcome.timing, winner.eager) else None,
        measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def disagree(graph: Timing, eager: Timing) -> bool:
    """Whether launching one by one takes visibly longer, or less, than replaying a graph."""
    return abs(eager.median / graph.median - 1) > EAGER_DIFFERS


def _accuracy(accuracy: Accuracy | None) -> dict[str, float] | None:
    return {"max_abs": accuracy.max_abs, "similarity": accuracy.similarity} if accuracy else None
