"""Timing and Policy: what a measurement says and how it was taken; plain values that records keep and print."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TIE = 0.01
"""Relative difference of two medians that noise may have made."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over ``n`` samples: the median, and the 20th and 80th percentile as its spread."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Timing:
        """Summarise samples (at least one)."""
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))

    @classmethod
    def modelled(cls, microseconds: float) -> Timing:
        """A time that nobody measured: no samples, no spread."""
        return cls(microseconds, microseconds, microseconds, 0)


@dataclass(frozen=True)
class Policy:
    """How a kernel is timed: calls replayed from one CUDA graph, rotating over input sets that L2 cannot hold."""

    graph: bool = True
    """Replay a captured graph (serving's way); plain launches also count the host's work."""
    cold_l2: bool = True
    """Rotate over input sets larger than twice the L2; otherwise one set is read again and again."""
    reps: int = 20
    """Calls per graph, at least; one sample is the time of a replay divided by its calls."""
    rounds: int = 10
    """Replays timed, spread over the whole measurement: several variants take turns."""
    warmup_ms: float = 20.0
    """Replays before the first sample, so that clocks have settled."""


COLD = Policy()
"""The headline of every comparison."""
WARM = Policy(cold_l2=False)
"""Stands beside it where serving finds its inputs in L2: decode, few rows."""
