"""Several workers share one list of jobs, until it is done or time is up: checks on a GPU wait for compilers and the host."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from ..errors import DsaError
from ..kernels.build import preload
from ..nursery import Nursery
from ..worker import Worker, WorkerTimeout

_IMPORTED = ("triton",)  # once, for all children; TileLang asks for GPUs as it is imported, after which no fork can use them
_ASKS_NOT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # nor may torch ask the driver


def at_once(
    job: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    workers: int,
    *,
    seconds: float,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
    told: Callable[[int, Any], None] = lambda number, outcome: None,
) -> list[Any]:
    """``job(*call)`` of each call in one of so many child processes, the first calls first.

    Args:
        seconds: for it all, the children's start included; a call that time was up for is None.
        timeout: seconds of one call.
        environment: variables of the children.
        told: is given the number and the outcome of each call that ended, one at a time.

    Returns:
        the calls' results in their order; what one raised, or how its process ended, is a ``DsaError`` in its place.
    """
    end, lock = time.monotonic() + seconds, threading.Lock()
    waiting, outcomes = deque(enumerate(calls)), [None] * len(calls)

    def keep(number: int, outcome: Any) -> None:
        with lock:
            outcomes[number] = outcome
            told(number, outcome)

    nursery = Nursery(preload, (_IMPORTED,), {**_ASKS_NOT, **(environment or {})})
    with closing(nursery), ThreadPoolExecutor(workers) as threads:
        each = [
            threads.submit(_serve, job, waiting, Worker(environment, nursery=nursery), end, timeout, keep)
            for _ in range(min(workers, len(calls)))
        ]
    for served in each:
        served.result()  # raises what is no outcome of a call: one that cannot be sent, say
    return outcomes


def _serve(
    job: Callable[..., Any],
    waiting: deque[tuple[int, tuple[Any, ...]]],
    worker: Worker,
    end: float,
    timeout: float,
    keep: Callable[[int, Any], None],
) -> None:
    with worker:
        while waiting and time.monotonic() < end:
            try:
                number, call = waiting.popleft()
            except IndexError:  # another took the last one in between
                return
            try:
                keep(number, worker.call(job, *call, timeout=min(timeout, max(1.0, end - time.monotonic()))))
            except DsaError as error:
                worker.kill()  # its CUDA context may be poisoned
                if not (isinstance(error, WorkerTimeout) and time.monotonic() >= end):
                    keep(number, error)
