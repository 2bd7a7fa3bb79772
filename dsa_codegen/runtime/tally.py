"""Tally: a count that many threads add to, without a lock on the path of every call."""

from __future__ import annotations

import itertools
import threading


class Tally:
    """A count that starts at 0. To add is one step of ``itertools.count``: a single C call, which no other thread can split."""

    __slots__ = ("_behind", "_lock", "add", "ticks")

    def __init__(self) -> None:
        self.ticks = itertools.count()
        """For C, which takes a step of it without a call."""
        self._behind = 0  # steps that were not counted: each look at the value takes one
        self._lock = threading.Lock()
        self.add = self.ticks.__next__

    def value(self) -> int:
        """How often ``add`` was called since the start or the last ``zero``."""
        with self._lock:
            value = next(self.ticks) - self._behind
            self._behind += 1
        return value

    def zero(self) -> None:
        """Start anew."""
        with self._lock:
            self._behind = next(self.ticks) + 1
