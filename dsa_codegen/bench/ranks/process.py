"""One rank of a timed run: checks every way against what one rank computes, times it, and says what its exchange costs."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...problem.compare import similarity_gap
from . import transport
from .cases import Case, groups
from .ways import PROBLEMS, Results, Way

BUILT = "built"
"""A file in the store that says that all kernels are built: ranks start, and meet, meanwhile."""
_CALLS = 20  # of decode in a graph
_ROUNDS, _FEW, _LONG = 5, 2, 1e6  # a run of more than a second is timed twice
_AGREEING = 0.999  # of the chosen; a kernel that serves other sizes rounds sums otherwise


@dataclass(frozen=True)
class Timed:
    """What one way was seen to do; microseconds of the slowest rank, medians over rounds."""

    name: str
    us: float
    spread_us: tuple[float, float]
    sent: int
    """Bytes that a rank sends."""
    exchange_us: float
    """Of the same collectives alone."""
    exposed_us: float
    """What the step takes longer than where what is exchanged is there already."""
    agreeing: float
    """Share of the chosen that one rank chooses too, where it is lowest."""
    similarity: float
    """Of outputs to one rank's, where it is worst."""
    graph: bool


class Rank:
    """A process of a group, with its device."""

    def __init__(self, rank: int, world: int, group: Any, device: torch.device) -> None:
        self.rank, self.world, self.group, self.device = rank, world, group, device

    def wait(self) -> None:
        """For the device, and for all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world > 1:
            dist.barrier(self.group)

    def worst(self, *values: float) -> list[float]:
        """The largest of each over the ranks."""
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def time_us(self, run: Callable[[], object]) -> float:
        """One run, of the slowest rank."""
        self.wait()
        if self.device.type != "cuda":
            run()
            return 1.0
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(self.device)
        return self.worst(before.elapsed_time(after) * 1000)[0]


def time_case(case: Case, rank: Rank) -> list[Timed]:
    """Every way of one case."""
    problem = PROBLEMS[case.stage](case, rank.rank, rank.world, rank.group, rank.device)
    found = []
    for way in problem.ways():
        found.append(_time_way(way, rank, case.stage == "decode"))
        if rank.rank == 0:  # runs are long, and have no bar
            print(f"{case.stage} {case.context} x{rank.world} {way.name}: {found[-1].us:.1f} us", file=sys.stderr, flush=True)
    return found


def _time_way(way: Way, rank: Rank, captured: bool) -> Timed:
    with transport.noted() as messages:
        agreeing, similarity = _compared(way, rank)
    run, calls, graph = _prepared(way.run, rank, captured)
    times = [rank.time_us(run) / calls]
    rounds = _FEW if times[0] > _LONG else _ROUNDS
    times += [rank.time_us(run) / calls for _ in range(rounds - 1)]
    exchange = exposed = 0.0
    if messages:
        collectives, count, _ = _prepared(transport.Collectives(messages, rank.device), rank, captured)
        exchange = statistics.median(rank.time_us(collectives) / count for _ in range(rounds))
        with transport.absent(messages):
            silent, count, _ = _prepared(way.run, rank, captured)
            exposed = statistics.median(times) - statistics.median(rank.time_us(silent) / count for _ in range(rounds))
    spread = min(times), max(times)
    return Timed(
        way.name,
        statistics.median(times),
        spread,
        transport.sent_bytes(messages),
        exchange,
        exposed,
        agreeing,
        similarity,
        graph,
    )


def _compared(way: Way, rank: Rank) -> tuple[float, float]:
    """(share of the chosen that agree, similarity of the outputs where they do), the worst over the ranks."""
    found, expected = way.found(way.run()), way.expected()
    same = (found[2] == expected[2]).flatten(0, -2)
    rows = same.all(-1)
    out, wanted = (each.flatten(0, found[2].dim() - 2)[rows] for each in (found[0], expected[0]))
    missing, gap = rank.worst(1 - _shared(found, expected), float(similarity_gap(out, wanted)))
    assert 1 - missing >= _AGREEING, f"{way.name}: {100 * missing:.2f} % of the chosen are others"
    return 1 - missing, gap


def _shared(found: Results, expected: Results) -> float:
    """The share of chosen tokens that are in both lists of a row."""
    a, b = (each[2].flatten(0, -2).sort(-1).values for each in (found, expected))
    if not a.numel():
        return 1.0
    at = torch.searchsorted(b, a).clamp(max=b.shape[-1] - 1)
    return float((b.gather(-1, at) == a).float().mean())


def _prepared(run: Callable[[], object], rank: Rank, captured: bool) -> tuple[Callable[[], object], int, bool]:
    """(something to call, how many runs that is, whether it is a graph)."""
    run()
    rank.wait()
    if not captured or rank.device.type != "cuda":
        return run, 1, False
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls can spoil it: NCCL's own thread looks at events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            run()
    graph.replay()
    return graph.replay, _CALLS, True


def main(rank: int, processes: int, cases: Sequence[Case], sizes: Sequence[int], device: str, store: Path) -> None:
    """A process: joins the group, times every case in groups of each size; rank 0 leaves ``(case, world, timed)`` in the store.

    Args:
        device: "cuda" (NCCL) or "cpu" (gloo).
        store: a folder; ``timed.pt`` in it is written anew after every case, so that a run that is stopped has what is behind.
    """
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    else:
        torch.set_num_threads(1)
    transported = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(transported, store=dist.FileStore(str(store / "ranks"), processes), rank=rank, world_size=processes)
    joined = {world: dist.new_group(list(range(world))) for world in sizes}
    while not (store / BUILT).exists():
        time.sleep(0.05)
    done: list[tuple[Case, int, Timed]] = []
    for case in cases:
        for world in groups(case, sizes):
            if rank < world:
                done += [(case, world, each) for each in time_case(case, Rank(rank, world, joined[world], where))]
                if device == "cuda":
                    torch.cuda.empty_cache()
            if rank == 0:
                torch.save(done, store / "timed.pt")
    dist.barrier()
    dist.destroy_process_group()
