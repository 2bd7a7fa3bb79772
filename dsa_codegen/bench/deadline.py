"""Deadline: how much of a run's wall time is left, so that it ends by itself with everything written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Deadline:
    """Counts from its making.

    Args:
        seconds: what the whole run may take; infinite by default.
    """

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._start = clock()

    @property
    def left(self) -> float:
        """Seconds; 0 once it has passed."""
        return max(0.0, self._start + self.seconds - self._clock())

    @property
    def passed(self) -> bool:
        """Whether nothing new may begin."""
        return self.left <= 0
