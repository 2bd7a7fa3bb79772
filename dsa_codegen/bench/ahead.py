"""Ahead: everything that would compile during a benchmark is compiled before it, ours on all cores, the peers' beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..build import build_all
from ..dispatch import chosen
from ..errors import DsaError
from ..gpu import Gpu
from ..render import Rendered, render
from ..worker import Worker
from . import contest
from .cases import BenchCase
from .peers import Peer
from .problems import stage_of

_WORKERS = 6
_FIRST_CALL_SECONDS = 90.0

PeersOf = Callable[[BenchCase], Sequence[Peer]]


def build(cases: Sequence[BenchCase], gpu: Gpu, peers_of: PeersOf, sources: Sequence[str], device: str) -> None:
    """Build our kernels; run the first calls with which peers compile. What fails here says so in its row."""
    ours = threading.Thread(target=build_all, args=(kernels(cases, gpu), gpu))
    ours.start()
    _first_calls(first_calls(cases, peers_of), sources, device)
    ours.join()


def kernels(cases: Sequence[BenchCase], gpu: Gpu) -> list[Rendered]:
    """What the dispatcher will want built."""
    parts = [part for case in cases for part in stage_of(case.stage).parts(case)]
    rendered = (render(part.op, part.spec, chosen(part.op, part.spec, part.sizes, gpu).config) for part in parts)
    return list({each.sha: each for each in rendered}.values())


def first_calls(cases: Sequence[BenchCase], peers_of: PeersOf) -> list[tuple[BenchCase, str]]:
    """One case, the shortest, and the peer's name for everything that a peer compiles."""
    found: dict[Any, tuple[BenchCase, str]] = {}
    for case in sorted(cases, key=lambda each: each["context"]):
        for peer in peers_of(case):
            key = peer.build_key(case)
            if key is not None:
                found.setdefault(key, (case, peer.name))
    return list(found.values())


def _first_calls(waiting: list[tuple[BenchCase, str]], sources: Sequence[str], device: str) -> None:
    workers = [Worker() for _ in range(min(_WORKERS, len(waiting)))]
    try:
        while waiting or any(worker.busy for worker in workers):
            for worker in workers:
                if worker.busy and worker.ready():
                    _take(worker)
                if not worker.busy and waiting:
                    case, name = waiting.pop()
                    worker.submit(contest.attempt, case, sources, name, device, timeout=_FIRST_CALL_SECONDS)
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()


def _take(worker: Worker) -> None:
    try:
        worker.result()
    except DsaError:
        worker.kill()
