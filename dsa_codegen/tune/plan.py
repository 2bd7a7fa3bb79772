"""Plan: what a tuning run is given and what it leaves: operations and their size buckets, a budget, a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..gpu import Gpu
from ..problem.op import Case, Op
from ..problem.values import Bucket, Spec
from ..records.record import Record
from .problem import Problem
from .progress import StudyStatus

STATE = Path(".tune")
"""Where journals, clocks and builds of runs lie by default."""


@dataclass(frozen=True)
class Budget:
    """How long to search: whichever is spent first."""

    wall_s: float | None = None
    """Seconds for the whole run, its finals included."""
    trials: int = 48
    """Candidates per operation, bucket and backend."""


ON_GPU = Budget(600.0, 48)
"""By default: every bucket of a model in ten minutes."""
OFFLINE = Budget(240.0, 24)
"""By default without a GPU: most of it is compiling, on however few cores there are."""


@dataclass(frozen=True)
class Report:
    """What a run leaves."""

    records: tuple[Record, ...]
    files: tuple[Path, ...]
    studies: tuple[StudyStatus, ...]
    notes: tuple[str, ...]
    """What was left out and why; what failed more often than not, with its first message."""
    interrupted: bool
    elapsed_s: float


def problems(wanted: Sequence[tuple[Op, Spec]], gpu: Gpu) -> list[Problem]:
    """One problem per operation and size bucket that people serve: the bucket's first workload."""
    found = []
    for op, spec in wanted:
        by_bucket: dict[Bucket, Case] = {}
        for case in op.workloads(spec):
            by_bucket.setdefault(case.sizes.bucket(), case)
        found += [Problem(op, spec, case, gpu) for case in by_bucket.values()]
    return list({problem.id: problem for problem in found}.values())  # two models may share a spec
