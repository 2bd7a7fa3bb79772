"""Lock: one process at a time at a study, at a run's builds and clock; whoever comes second waits, and touches nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock

from ..errors import DsaError

_AGAIN_SECONDS = 0.2


class StudyBusy(DsaError):
    """Another process is searching this study, or has the same aim."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"another tuning run is using {path}; nothing was changed: wait for it, or stop it and start this one again."
        )
        self.path = path


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


@dataclass(frozen=True)
class Patience:
    """How long a run waits for another one.

    Args:
        seconds: 0: not at all.
        tell: called once with what is waited for.
    """

    seconds: float = 0.0
    tell: Callable[[Path], None] = lambda path: None

    def take_all(self, paths: list[Path]) -> list[filelock.BaseFileLock]:
        """The locks of all paths, or none of them: two runs that wait for each other's would wait for ever.

        Raises:
            StudyBusy: another process held one the whole time.
        """
        end, told = time.monotonic() + self.seconds, False
        while True:
            try:
                return _all(paths)
            except StudyBusy as busy:
                if time.monotonic() >= end:
                    raise
                if not told:
                    told = True
                    self.tell(busy.path)
            time.sleep(_AGAIN_SECONDS)


IMPATIENT = Patience()


def _all(paths: list[Path]) -> list[filelock.BaseFileLock]:
    locks: list[filelock.BaseFileLock] = []
    try:
        for path in paths:
            locks.append(take(path))
    except StudyBusy:
        for lock in locks:
            lock.release()
        raise
    return locks
