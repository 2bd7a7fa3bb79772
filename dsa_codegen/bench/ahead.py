"""Ahead: everything that would compile during a benchmark is compiled before it, ours on all cores, the peers' beside it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from ..errors import DsaError
from ..gpu import Gpu
from ..kernels.build import build_all
from ..kernels.render import Rendered, render
from ..runtime.dispatch import chosen
from ..worker import JobFailed, Worker
from . import contest
from .cases import BenchCase
from .deadline import Deadline
from .peers import Peer
from .problems import stage_of

_WORKERS = 16
_NICE = 10  # a peer compiles one kernel in a minute, while ours are many and small: they fill what it leaves
_FIRST_CALL_SECONDS = 150.0  # some compile large CUDA sources, all at once
_BUILD_SECONDS = 180.0

PeersOf = Callable[[BenchCase], Sequence[Peer]]
Crashes = dict[tuple[str, str], str]
"""By peer and stage: how its first call ended the process."""


def build(
    cases: Sequence[BenchCase], gpu: Gpu, peers_of: PeersOf, sources: Sequence[str], device: str, deadline: Deadline
) -> Crashes:
    """Build our kernels; run the first calls with which peers compile. What fails here says so in its row."""
    ours = threading.Thread(target=_build_behind, args=(cases, gpu), daemon=True)
    ours.start()
    crashes = _first_calls(first_calls(cases, peers_of), sources, device, deadline)
    ours.join(min(_BUILD_SECONDS, deadline.left))
    return crashes


def _build_behind(cases: Sequence[BenchCase], gpu: Gpu) -> None:
    """As ``build_ours``, by compilers that give way to the peers'."""
    thread = threading.get_native_id()  # what it starts takes after it; the process goes on as it was
    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICE))
    build_ours(cases, gpu)


def build_ours(cases: Sequence[BenchCase], gpu: Gpu) -> None:
    """Build every kernel of this package that the cases call."""
    build_all(kernels(cases, gpu), gpu)


def kernels(cases: Sequence[BenchCase], gpu: Gpu) -> list[Rendered]:
    """What the dispatcher will want built."""
    stages = ((stage_of(case.stage), case) for case in cases)
    parts = [part for stage, case in stages for part in (*stage.parts(case), *stage.helpers(case))]
    rendered = (render(part.op, part.spec, chosen(part.op, part.spec, part.sizes, gpu).config) for part in parts)
    return list({each.sha: each for each in rendered}.values())


def first_calls(cases: Sequence[BenchCase], peers_of: PeersOf) -> list[tuple[BenchCase, str]]:
    """One case, the smallest, and the peer's name for everything that a peer compiles; each peer's first before any second."""
    found: dict[Any, tuple[BenchCase, str]] = {}
    for case in sorted(
        cases, key=lambda each: (dict(each.shape).get("context", 0), math.prod(value for _, value in each.shape))
    ):
        for peer in peers_of(case):
            key = _key(peer, case)
            if key is not None:
                found.setdefault(key, (case, peer.name))
    return _peers_in_turn(found.values())


def _peers_in_turn(calls: Iterable[tuple[BenchCase, str]]) -> list[tuple[BenchCase, str]]:
    """Who compiles longest is not known, but whoever it is begins at once."""
    before: Counter[str] = Counter()
    placed = []
    for call in calls:
        placed.append((before[call[1]], call))
        before[call[1]] += 1
    return [call for _, call in sorted(placed, key=lambda each: each[0])]


def _key(peer: Peer, case: BenchCase) -> Hashable | None:
    try:
        return peer.build_key(case)
    except Exception:  # an adapter that cannot say it compiles in its case, where whatever is wrong becomes a note
        return None


def _first_calls(waiting: list[tuple[BenchCase, str]], sources: Sequence[str], device: str, deadline: Deadline) -> Crashes:
    workers = {Worker(): ("", "") for _ in range(min(_WORKERS, len(os.sched_getaffinity(0)), len(waiting)))}
    crashes: Crashes = {}
    try:
        while not deadline.passed and (waiting or any(worker.busy for worker in workers)):
            for worker, who in workers.items():
                if worker.busy and worker.ready():
                    crashes |= _taken(worker, who)
                if not worker.busy and waiting:
                    case, name = waiting.pop(0)
                    workers[worker] = name, case.stage
                    worker.submit(contest.attempt, case, sources, name, device, timeout=_FIRST_CALL_SECONDS)
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
    return crashes


def _taken(worker: Worker, who: tuple[str, str]) -> Crashes:
    try:
        worker.result()
    except JobFailed:  # it raises the same in its case, where it becomes a note
        worker.kill()
    except DsaError as error:
        worker.kill()
        return {who: f"crashed: {error}"}
    return {}
