"""Progress: what a tuning run tells while it runs, as plain values for whoever draws the bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .outcome import Kind


@dataclass(frozen=True)
class StudyStatus:
    """One study: an operation's backend in one size bucket."""

    label: str
    """For people: ``indexer.triton, queries 1025+``."""
    spec: str
    """The spec's id: an operation may be tuned for several."""
    evaluated: int
    trials: int
    """Evaluated at most."""
    best_us: float | None
    default_us: float | None
    counts: Mapping[Kind, int]
    done: bool


@dataclass(frozen=True)
class Progress:
    """The whole run at one moment."""

    phase: str
    """"search", "finals" or "done"."""
    elapsed_s: float
    budget_s: float | None
    studies: tuple[StudyStatus, ...]
    finals: int = 0
    """Problems whose final is over and whose records are written."""
    problems: int = 0

    @property
    def fraction(self) -> float:
        """Share of the run that is behind: by time where there is a budget, by trials where that is further."""
        if self.phase == "done":
            return 1.0
        planned = sum(study.trials for study in self.studies)
        by_trials = sum(study.trials if study.done else study.evaluated for study in self.studies) / max(planned, 1)
        by_time = self.elapsed_s / self.budget_s if self.budget_s else 0.0
        by_finals = self.finals / max(self.problems, 1)
        return min(0.99, max(by_trials * 0.9, by_time, 0.9 + 0.1 * by_finals if self.phase == "finals" else 0.0))

    @property
    def eta_s(self) -> float | None:
        """Seconds still to go, at the pace so far; None where nothing can be said yet."""
        return self.elapsed_s * (1 / self.fraction - 1) if self.fraction > 0.01 else None

    @property
    def counts(self) -> dict[Kind, int]:
        """Outcomes by kind over all studies."""
        return {kind: sum(study.counts.get(kind, 0) for study in self.studies) for kind in Kind}


Notify = Callable[[Progress], None]
