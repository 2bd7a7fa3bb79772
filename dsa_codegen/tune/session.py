"""Session: how much of its budget an interrupted run had used, so that the next one with the same aim goes on with the rest."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

_SAVE_EVERY_S = 2.0


class Session:
    """The clock of a run. It lies in ``.tune/<gpu>/<digest of the aim>.session`` until the run is over.

    Args:
        aim: what identifies the run: problems, backends, method.
    """

    def __init__(self, folder: Path, aim: Iterable[str], budget_s: float | None) -> None:
        digest = hashlib.sha256("\n".join(aim).encode()).hexdigest()[:12]
        self._path = folder / f"{digest}.session"
        self.budget_s = budget_s
        self.earlier_s = self._load()
        self._start = time.monotonic()
        self._saved = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, earlier runs that were interrupted included."""
        return self.earlier_s + time.monotonic() - self._start

    def deadline(self, share: float) -> float:
        """When ``time.monotonic()`` will have used this share of the budget."""
        if self.budget_s is None:
            return float("inf")
        return self._start + share * self.budget_s - self.earlier_s

    def save(self) -> None:
        """Note the time, every two seconds."""
        now = time.monotonic()
        if now - self._saved > _SAVE_EVERY_S:
            self._saved = now
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"elapsed_s": self.elapsed_s}))
            os.replace(temporary, self._path)

    def finish(self) -> None:
        """The run is over: the next one has its own budget."""
        self._path.unlink(missing_ok=True)

    def _load(self) -> float:
        try:
            return float(json.loads(self._path.read_text())["elapsed_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0
