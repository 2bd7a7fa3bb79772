"""Ledger: how much of its budget an interrupted run had used, so that the next one with the same aim goes on with the rest."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from .lock import IMPATIENT, Patience
from .stock import trim

_SAVE_EVERY_S = 2.0


class Ledger:
    """The clock of a run and the log of its workers, in ``.tune/<gpu>/`` under the aim's digest, and the builds of all runs.

    The clock goes when the run is over; the log stays, for whoever wants to know why candidates failed, and so do builds within
    a limit. A ledger is entered before anything of it is used, by one process at a time.

    Args:
        aim: what identifies the run: problems, backends, method.
        patience: with another run of the same aim.
    """

    def __init__(self, folder: Path, aim: Iterable[str], budget_s: float | None, patience: Patience = IMPATIENT) -> None:
        self.folder = folder
        self._patience = patience
        digest = hashlib.sha256("\n".join(aim).encode()).hexdigest()[:12]
        self._path = folder / f"{digest}.clock"
        self.builds = folder / "builds"
        self.log = folder / f"{digest}.log"
        self.budget_s = budget_s
        self.earlier_s = 0.0
        self._start = time.monotonic()
        self._saved = 0.0

    def __enter__(self) -> Ledger:
        """Keep other runs with the same aim away.

        Raises:
            StudyBusy: one is under way, and does not end in time.
        """
        (self._lock,) = self._patience.take_all([self._path])
        self.earlier_s = self._load()
        self.begin()
        return self

    def begin(self) -> None:
        """The clock starts now: waiting for others costs nothing of the budget."""
        self._start = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, earlier runs that were interrupted included."""
        return self.earlier_s + time.monotonic() - self._start

    def deadline(self, share: float) -> float:
        """When ``time.monotonic()`` will have used this share of the budget."""
        if self.budget_s is None:
            return float("inf")
        return self._start + share * self.budget_s - self.earlier_s

    def tick(self) -> None:
        """Note the time, every two seconds."""
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Note the time now."""
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"elapsed_s": self.elapsed_s}))
        os.replace(temporary, self._path)

    def finish(self) -> None:
        """The run is over: the next one has a budget of its own."""
        self._path.unlink(missing_ok=True)
        trim(self.builds)

    def restart(self) -> None:
        """Begin anew, as if nothing had been spent."""
        self._path.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        self.earlier_s = 0.0

    def _load(self) -> float:
        try:
            return float(json.loads(self._path.read_text())["elapsed_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0
