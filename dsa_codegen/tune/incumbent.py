"""Incumbent: the measured record that serves a problem today; it runs in the final, and gives way only to what is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..problem.op import Config
from ..problem.values import contains, octaves
from ..records.files import read_all
from ..records.record import MEASURED, GpuKey, Record
from .problem import Problem
from .standing import standing


@dataclass(frozen=True)
class Incumbent:
    """A record that holds, with its config as the operation reads it today."""

    record: Record
    config: Config


def incumbents(problem: Problem, folders: Sequence[Path]) -> dict[str, Incumbent]:
    """By backend the measured record that holds for exactly this spec, GPU and range of sizes.

    The folder named first comes first, then the tightest range of sizes.
    """
    found: dict[str, Incumbent] = {}
    for folder in folders:
        for each in sorted(_holding(problem, folder), key=lambda each: octaves(each.record.bucket)):
            found.setdefault(each.record.backend, each)
    return found


def _holding(problem: Problem, folder: Path) -> Iterator[Incumbent]:
    spec, bucket, gpu = problem.spec.to_dict(), problem.case.sizes.bucket(), GpuKey.of(problem.gpu)
    for record in read_all(folder, problem.op.name):
        same = record.evidence == MEASURED and record.gpu == gpu and problem.op.completed(record.spec) == spec
        if same and contains(record.bucket, bucket):
            state = standing(record)
            if state.holds and state.config is not None:
                yield Incumbent(record, state.config)


@dataclass(frozen=True)
class Change:
    """What a run made of a problem's record for one backend."""

    now: Record
    before: Record | None = None
    """What served until then; None where there was none."""
    before_us: float | None = None
    """What that took in this run's final, beside the new one; None where it no longer runs or is no longer right."""
    why: str = ""
    """Why it was not timed."""
    kept: bool = False
    """Whether the config is what the operation read there before: a record may be older than one of its parameters."""
