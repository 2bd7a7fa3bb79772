"""Plan: what a tuning run is given and what it leaves: operations and their size buckets, a budget, a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import paths
from ..errors import InputError, UnknownName
from ..gpu import Gpu
from ..kernels.backends import NAMES
from ..problem.op import Case, Op
from ..problem.values import Bucket, Spec
from ..records.record import Record
from .account import Account
from .incumbent import Change
from .outcome import Kind
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


SEEDS = 2**31
"""Seeds are below it: with a study's own digest they stay within what the samplers take."""


def check(budget: Budget, seed: int, processes: int | None, backends: Sequence[str], folder: Path, state: Path) -> None:
    """Refuse what a run would fail on, before it touches anything.

    Raises:
        InputError: a number out of its range, or a folder that cannot be written.
        UnknownName: there is no such backend.
    """
    for name in backends:
        if name not in NAMES:
            raise UnknownName("backend", name, NAMES)
    if not 0 <= seed < SEEDS:
        raise InputError("seed", seed, f"0 to {SEEDS - 1}")
    if processes is not None and processes < 1:
        raise InputError("processes", processes, "1 or more")
    if budget.trials < 1:
        raise InputError("trials", budget.trials, "1 or more")
    if budget.wall_s is not None and not budget.wall_s > 0:
        raise InputError("budget", f"{budget.wall_s} s", "a time above 0")
    require_writable(folder, "folder")
    require_writable(state, "state")


def require_writable(folder: Path, argument: str) -> None:
    """Raise InputError where nothing can be written to ``folder``, which need not be there yet."""
    reason = paths.unwritable(folder)
    if reason:
        raise InputError(argument, str(folder), f"a folder that can be written ({reason})")


@dataclass(frozen=True)
class Missing:
    """A problem that a run leaves without any record of its own."""

    problem: Problem
    reason: str
    failed: bool
    """Whether it had its turn: candidates were tried, and none was right."""


@dataclass(frozen=True)
class Failure:
    """How candidates of a study failed: one kind of failure, how often, and its first instance."""

    study: str
    kind: Kind
    count: int
    message: str
    again: str
    """What ``dsa tune --again`` takes: the first one's journal and trial; empty where a database keeps them."""


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
    missing: tuple[Missing, ...] = ()
    failures: tuple[Failure, ...] = ()
    """Those that a candidate is to blame for; what is infeasible is none."""
    changes: tuple[Change, ...] = ()
    """What each record replaces, with both times."""
    account: Account | None = None
    """Where the search's time went; None where it did not come to its end, or other hosts searched."""


def problems(wanted: Sequence[tuple[Op, Spec]], gpu: Gpu) -> list[Problem]:
    """One problem per operation and size bucket that people serve: the bucket's first workload."""
    found = []
    for op, spec in wanted:
        by_bucket: dict[Bucket, Case] = {}
        for case in op.workloads(spec):
            by_bucket.setdefault(case.sizes.bucket(), case)
        found += [Problem(op, spec, case, gpu) for case in by_bucket.values()]
    return list({problem.id: problem for problem in found}.values())  # two models may share a spec
