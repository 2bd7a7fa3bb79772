"""Account: what GPUs, compilers and the one who asks did with a search's seconds, so that a run says what it waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

STARTING, INPUTS, JUDGING = "starting", "drawing inputs", "judging"
BUILDS, QUESTIONS = "waiting for builds", "waiting to be asked"


class Stopwatch:
    """Seconds by activity, one at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget what was."""
        self._seconds: dict[str, float] = {}
        self._activity, self._since = STARTING, self._clock()

    def turn_to(self, activity: str) -> None:
        """From now on it is this."""
        now = self._clock()
        self._seconds[self._activity] = self._seconds.get(self._activity, 0.0) + now - self._since
        self._activity, self._since = activity, now

    @property
    def seconds(self) -> Mapping[str, float]:
        """Until now."""
        self.turn_to(self._activity)
        return dict(self._seconds)


@dataclass(frozen=True)
class Account:
    """Of one search."""

    wall_s: float
    gpus: Sequence[Mapping[str, float]]
    """Seconds by activity of each GPU's process."""
    judged: Sequence[int]
    """Candidates of each GPU."""
    compilers: int
    compiling_s: float
    """Of all compilers together."""
    asked: int
    asking_s: float
    """To find and to note what is tried next; the one who asks also deals out what is built."""

    def lines(self) -> Iterator[str]:
        """For people: where the time went, GPU by GPU, then compilers and questions."""
        total, wall_s = sum(self.judged), self.wall_s
        if not self.gpus or not wall_s:
            return
        yield f"search: {total} candidates in {wall_s:.1f} s, {total / wall_s:.2f} a second"
        for number, (seconds, judged) in enumerate(zip(self.gpus, self.judged, strict=True)):
            shares = (f"{activity} {100 * each / wall_s:.0f} %" for activity, each in seconds.items() if each > 0)
            yield f"  GPU {number}: {judged} candidates; {', '.join(shares)}"
        busy, asking = self.compiling_s / max(self.compilers, 1) / wall_s, self.asking_s / wall_s
        yield f"  {self.compilers} compilers, busy {100 * busy:.0f} %; {self.asked} questions, {100 * asking:.0f} %"
