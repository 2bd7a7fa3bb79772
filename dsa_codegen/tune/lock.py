"""Lock: one process at a time at a study, at a run's builds and clock; whoever comes second is told, and touches nothing."""

from __future__ import annotations

from pathlib import Path

import filelock

from ..errors import DsaError


class StudyBusy(DsaError):
    """Another process is searching this study, or has the same aim."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"another tuning run is using {path}; nothing was changed: wait for it, or stop it and start this one again."
        )


def take(path: Path) -> filelock.BaseFileLock:
    """The lock of whatever lies at ``path``; it ends with the process, however that ends.

    Raises:
        StudyBusy: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise StudyBusy(path) from error
    return lock
