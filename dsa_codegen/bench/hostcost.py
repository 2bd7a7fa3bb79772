"""Host cost: what a call costs the host on a hit of the dispatcher, against the bare kernel and the peers' entry points."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..gpu import Gpu
from ..kernels.build import build
from ..kernels.render import render
from ..kernels.variant import Variant
from ..problem.draw import Draw
from ..proof.measure import measure_calls
from ..proof.stopwatch import Stopwatch
from ..proof.timing import Policy
from ..runtime import dispatch
from . import peers as adapters
from .cases import BenchCase, case
from .contest import OURS
from .problems import stage_of
from .stage import Run

_CALLS = 100  # so few that the host is never kept waiting, where it launches faster than the device runs
_ROUNDS = 15
_IN_GRAPH = Policy(cold_l2=False, reps=100, rounds=10, warmup_ms=5.0)
PLAIN = "plain"
"""Launches that everybody knows the price of."""
# Small enough that the device is never far behind the host, which would then wait for it.
CASES = (
    case("select", "normal", {"rows": 1, "context": 4096, "k": 2048}),
    case("indexer_decode", "full", {"batch": 1, "next_n": 1, "context": 2048, "heads": 64, "head_dim": 128, "page": 64}),
    case(
        "attention_decode",
        "random",
        {"batch": 1, "next_n": 1, "context": 4096, "heads": 128, "head_dim": 576, "k": 2048, "page": 64},
    ),
    case("attention_prefill", "random", {"queries": 1, "context": 4096, "heads": 128, "head_dim": 576, "k": 2048}),
)


@dataclass(frozen=True)
class HostCost:
    """Microseconds of a call: the host's without a graph, the device's inside one."""

    name: str
    what: str
    host_us: float | None
    graph_us: float | None
    note: str = ""
    add_us: float | None = None
    """What torch's ``add_`` took the host in turns with it: hosts differ by half, and so does one from minute to minute."""


@dataclass(frozen=True)
class Job:
    """Whose entry points are timed, on which of ``CASES`` (or ``PLAIN`` launches)."""

    what: str
    name: str


def jobs(sources: Sequence[str]) -> list[Job]:
    """Everything there is to time, one job for each that might take the process with it."""
    found = [Job(PLAIN, PLAIN)]
    for each in CASES:
        found.append(Job(each.stage, OURS))
        found += [Job(each.stage, peer.name) for peer in adapters.load(sources) if each.stage in peer.stages]
    return found


def measure_host(
    job: Job, gpu: Gpu, sources: Sequence[str], device: str = "cuda", stopwatch: Stopwatch | None = None
) -> list[HostCost]:
    """Time the entry points of one job."""
    timed = _Timed(_add(device), stopwatch)
    if job.what == PLAIN:
        return [timed(name, PLAIN, run) for name, run in _plain(device)]
    (each,) = (each for each in CASES if each.stage == job.what)
    inputs = stage_of(each.stage).inputs(each, Draw(0, device))
    if job.name == OURS:
        return [timed(name, each.stage, run) for name, run in _ours(each, inputs, gpu, device)]
    named = (peer for peer in adapters.load(sources) if peer.name == job.name and each.stage in peer.stages)
    return [_of_peer(peer, each, inputs, timed) for peer in named]


def _of_peer(peer: adapters.Peer, each: BenchCase, inputs: Any, timed: _Timed) -> HostCost:
    missing = peer.reason()
    if missing:
        return HostCost(peer.name, each.stage, None, None, missing)
    try:
        prepared = peer.prepare(each, inputs)
        if prepared is None:
            return HostCost(peer.name, each.stage, None, None, "does not serve the case")
        return timed(prepared.label, each.stage, prepared.run)
    except Exception as error:  # a foreign library may fail in any way
        return HostCost(peer.name, each.stage, None, None, f"failed: {type(error).__name__}: {error}"[:200])


def _ours(each: BenchCase, inputs: Any, gpu: Gpu, device: str) -> Iterator[tuple[str, Run]]:
    stage = stage_of(each.stage)
    yield f"{OURS}: public function", stage.ours(each, inputs).run
    if not device.startswith("cuda"):
        return
    (part,) = stage.parts(each)
    found = dispatch.chosen(part.op, part.spec, part.sizes, gpu)
    variant = Variant(part.op, part.spec, found.config, gpu, build(render(part.op, part.spec, found.config), gpu).load())
    outputs = part.op.allocate(part.spec, inputs)
    yield f"{OURS}: kernel and its launch parameters", lambda: variant.run(inputs, outputs)
    launches = part.op.launches(part.spec, found.config, inputs, outputs, gpu)
    kernels = [(variant.kernels[launch.kernel], launch.grid, launch.args) for launch in launches]

    def bare() -> None:
        for kernel, grid, args in kernels:
            kernel(grid, args)

    yield f"{OURS}: bare kernel launch ({len(kernels)})", bare


def _plain(device: str) -> Iterator[tuple[str, Run]]:
    yield "torch add_", _add(device)
    if device.startswith("cuda"):
        from .jit_launch import touch

        x = torch.zeros(1024, device=device)
        yield "Triton JIT launch, one argument", lambda: touch[(1,)](x)


def _add(device: str) -> Callable[[], object]:
    x = torch.zeros(1024, device=device)
    return lambda: x.add_(1)


@dataclass(frozen=True)
class _Timed:
    """Times one entry point after another, each in turns with the launch that everybody knows."""

    add: Callable[[], object]
    stopwatch: Stopwatch | None

    def __call__(self, name: str, what: str, run: Run) -> HostCost:
        for _ in range(20):
            run()
        (in_graph,) = measure_calls([[lambda: (run(), None)[1]]], _IN_GRAPH, self.stopwatch)
        graph_us = round(in_graph.timing.median, 3) if in_graph.policy.graph else None
        us, add_us = (round(each, 3) for each in host_us((run, self.add)))
        return HostCost(name, what, us, graph_us, "" if graph_us else "not captured in a graph", add_us)


def host_us(
    runs: Sequence[Callable[[], object]], clock: Callable[[], float] = time.perf_counter, calls: int | None = None
) -> list[float]:
    """Microseconds of the host per call of each: medians of rounds in turns that never wait for the device inside."""
    rounds: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, taken in zip(runs, rounds, strict=True):
            taken.append(_round_us(run, clock, calls or _CALLS))
    return [statistics.median(taken) for taken in rounds]


def _round_us(run: Callable[[], object], clock: Callable[[], float], calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    before = clock()
    for _ in range(calls):
        run()
    return (clock() - before) / calls * 1e6
