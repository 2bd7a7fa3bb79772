"""Check: records timed again on the GPU at hand and compared with what they say; nothing is written.

Clocks, drivers and boards differ: a record has drifted where its time moved by more than a tolerance and its spread, where its
config is no longer right, or where the default is faster today.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..gpu import Gpu
from ..proof.timing import TIE, Timing
from ..records.record import Record
from .evaluate import Evaluator
from .finals import mad_us
from .plan import STATE
from .refresh import Refresh, Tell, Wish
from .renewal import FINAL_SECONDS, Contest, Fate, Task
from .space import Candidate
from .standing import standing

TOLERANCE = 0.05
"""Relative, what two boards of one name, or one on two days, may differ by."""
HOLDS, SLOWER, FASTER, WRONG, OVERTAKEN, VOID = "holds", "slower", "faster", "wrong", "overtaken", "void"
DRIFTED = (SLOWER, WRONG, OVERTAKEN, VOID)
"""Of these a user should know; a record that is faster than it says does no harm."""


@dataclass(frozen=True)
class Drift:
    """What became of a record's promise."""

    record: Record
    what: str
    now: Timing | None = None
    default_us: float | None = None
    why: str = ""

    @property
    def change(self) -> float | None:
        """Relative to what the record says; None where it was not timed."""
        return self.now.median / self.record.time_us.median - 1 if self.now else None


@dataclass
class Checked:
    """What a check found."""

    drifts: list[Drift] = field(default_factory=list)
    unreached: list[Fate] = field(default_factory=list)
    """Records that could not be timed here, or for which no time was left, with the reason."""
    elsewhere: int = 0
    """Records that hold, of GPUs that are not here."""
    elapsed_s: float = 0.0
    interrupted: bool = False

    @property
    def drifted(self) -> list[Drift]:
        """Those that a user should know of."""
        return [drift for drift in self.drifts if drift.what in DRIFTED]


def check(
    folder: Path,
    here: Gpu | None,
    wish: Wish | None = None,
    *,
    tolerance: float = TOLERANCE,
    budget_s: float | None = None,
    processes: int | None = None,
    state: Path = STATE,
    tell: Tell = lambda done, all_: None,
) -> Checked:
    """Time the records of ``folder`` again, each beside its default.

    Args:
        here: the GPU at hand, whose records can be timed; None where there is none.
        tolerance: relative, beyond the spread of both measurements.
        budget_s: no problem is begun after so many seconds.

    Raises:
        StudyBusy: another process checks records of this GPU.
        RecordError: a file of records cannot be read.
    """
    wish = wish or Wish()
    checking = _Check(folder, here, Wish(wish.names, wish.gpu_id, every=True), tell, aim="check", tolerance=tolerance)
    report = checking.go(budget_s, processes, state)
    told = [fate for fate in report.fates if fate.what == "left"]
    voided = [Drift(fate.old, VOID, why=fate.why) for fate in report.fates if fate.what == "dropped" and fate.old]
    return Checked([*checking.drifts, *voided], told, report.holding, report.elapsed_s, report.interrupted)


@dataclass
class _Check(Refresh):
    """A refresh that keeps what it finds to itself."""

    tolerance: float = TOLERANCE
    drifts: list[Drift] = field(default_factory=list)

    def _judge(self, task: Task, evaluator: Evaluator) -> list[Fate]:
        trouble = evaluator.set_up(task.problem, task.old[0].backend)
        if trouble:
            return [Fate(old, "left", f"the problem cannot be set up: {trouble}") for old in task.old]
        contest = Contest(task, evaluator)
        if not contest.hold(FINAL_SECONDS):
            return [Fate(old, "left", "the final failed") for old in task.old]
        self.drifts += [drift_of(contest, *pair, self.tolerance) for pair in zip(task.old, task.shipped, strict=True)]
        return []

    def _settle(self, fates: Sequence[Fate]) -> None:
        self.report.fates += fates


def drift_of(contest: Contest, record: Record, shipped: Candidate | str, tolerance: float) -> Drift:
    """A record's drift, from a contest that is over."""
    said = contest.verdict(shipped)
    now = contest.time_of(shipped)
    if now is None:
        return Drift(record, VOID if isinstance(shipped, str) else WRONG, why=said)
    state = standing(record)
    if state.reason and not state.template:
        return Drift(record, VOID, now, contest.default_us, state.reason)
    default = contest.default_us
    if (
        default is not None
        and _led(record)
        and default < (1 - TIE) * now.median - 2 * mad_us(now)
        and not contest.is_default(shipped)
    ):
        return Drift(record, OVERTAKEN, now, default, f"the default takes {default:.4g} µs")
    return Drift(record, _moved(record.time_us, now, tolerance), now, default)


def _led(record: Record) -> bool:
    """Whether a record was as fast as the default when it was made: another backend's, which serves nothing, need not."""
    default_us = record.default_time_us
    return default_us is None or record.time_us.median <= (1 + TIE) * default_us


def _moved(before: Timing, now: Timing, tolerance: float) -> str:
    band = max(tolerance * before.median, 2 * mad_us(before), 2 * mad_us(now))
    if abs(now.median - before.median) <= band:
        return HOLDS
    return SLOWER if now.median > before.median else FASTER
