"""Stopwatch: the only touch between measuring and a GPU: capture calls into a graph, time one run, wait."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], None]

_HEAD_START = 200_000  # cycles, about 0.1 ms: what it takes to launch a graph passes before the first event, not after it


class Stopwatch(ABC):
    """What measuring needs of a device; a fake one makes measuring a matter of arithmetic."""

    @abstractmethod
    def capture(self, calls: Sequence[Run]) -> Run | None:
        """One graph of the calls in order, as something to replay; None where they cannot be captured."""

    @abstractmethod
    def time_us(self, run: Run) -> float:
        """Device time of one run, in microseconds; waits for it."""

    def settled_us(self, run: Run, untimed: int, timed: int = 1) -> float:
        """Device time of ``timed`` runs right behind ``untimed`` ones of the same, in microseconds; waits for them."""
        for _ in range(untimed):
            self.time_us(run)
        return sum(self.time_us(run) for _ in range(timed))


class CudaStopwatch(Stopwatch):
    """CUDA graphs and CUDA events on the current device."""

    def __init__(self) -> None:
        self._before = torch.cuda.Event(enable_timing=True)
        self._after = torch.cuda.Event(enable_timing=True)

    def capture(self, calls: Sequence[Run]) -> Run | None:
        calls[0]()  # loads the module and fills the allocator, neither of which a capture allows
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return _Replay(graph)

    def time_us(self, run: Run) -> float:
        return self.settled_us(run, 0)

    def settled_us(self, run: Run, untimed: int, timed: int = 1) -> float:
        if isinstance(run, _Replay):  # otherwise the first microseconds of a sample would be the launch's
            torch.cuda._sleep(_HEAD_START)
        for _ in range(untimed):  # all in one queue: a pause in which the host waits would let the clock rise
            run()
        self._before.record()
        for _ in range(timed):
            run()
        self._after.record()
        self._after.synchronize()
        return self._before.elapsed_time(self._after) * 1000


class _Replay:
    """A captured graph, told apart from plain launches, whose time is the host's too."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def __call__(self) -> None:
        self._graph.replay()
