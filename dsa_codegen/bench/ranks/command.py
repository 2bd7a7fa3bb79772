"""What ``cli.py bench --distributed`` does: a process for each GPU, groups of 1, 2, 4, … of them, rows of results."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...distributed import ContextParallel
from ...errors import DsaError, NoGpu
from ...gpu import Gpu
from ...kernels.build import build_all
from ...kernels.render import Rendered, render
from ...problem.values import Sizes
from ...runtime.dispatch import chosen
from ...runtime.serving import Limits, calls
from ..results import Row, groups_in, merge_rows, read_rows, rows_path
from . import process
from .cases import CASES, Case, groups, served
from .process import Timed
from .ways import ALONE, PLAIN, SAMPLE

_LONGEST_SECONDS = 600.0
_ONLY = {"weights": ("none", "fp32"), "slots": ("i32",), "power_of_two": (False,)}
"""Of the specs that serving may ask for, those that the cases do."""


class RunFailed(DsaError, RuntimeError):
    """A process of a run on several GPUs ended before its end."""

    def __init__(self, rank: int, code: int | None) -> None:
        super().__init__(f"rank {rank} of a run on several GPUs ended with {code}; what it printed says why.")


def sizes_of(devices: int) -> list[int]:
    """The sizes of groups: 1, 2, 4, … and all."""
    return sorted({*(1 << bit for bit in range(devices.bit_length()) if 1 << bit <= devices), devices})


def run(
    gpu: Gpu, facts: Mapping[str, Any], folder: Path, cases: Sequence[Case] = CASES, device: str = "cuda", devices: int = 0
) -> list[Row]:
    """Time the cases on all visible GPUs, and merge the rows into ``results/<gpu>x<n>.json`` of each n > 1.

    Args:
        facts: date, commit, toolchain.
        devices: how many processes; by default one for each GPU.

    Raises:
        NoGpu: there are not two.
        RunFailed: a process ended; what was timed before has been written.
    """
    devices = devices or torch.cuda.device_count()
    if devices < 2:
        raise NoGpu("bench --distributed, with two GPUs or more,")
    cases = served(cases, devices)
    with tempfile.TemporaryDirectory() as store:
        try:
            wanted = kernels(cases, sizes_of(devices), gpu) if device == "cuda" else []
            _processes(devices, (devices, cases, sizes_of(devices), device, Path(store)), lambda: build_all(wanted, gpu))
        finally:
            rows = rows_of(_timed(Path(store)), facts)
            for world in sorted({row["shape"]["ranks"] for row in rows}):
                mine = [row for row in rows if row["shape"]["ranks"] == world]
                merge_rows(rows_path(folder, f"{gpu.id}x{world}"), mine)
    return rows


def kernels(cases: Iterable[Case], sizes: Sequence[int], gpu: Gpu) -> list[Rendered]:
    """What the dispatcher will want built."""
    found: dict[str, Rendered] = {}
    for case in cases:
        rows = {"max_queries": case.context // case.least, "max_batch": 0} if case.stage == "prefill" else {}
        limits = Limits(**{"max_queries": 0, "max_batch": case.batch, **rows}, max_context=case.context, next_n=(1,))
        for world in groups(case, sizes):
            shared = ContextParallel().beyond(case.of_rank(1), limits, world) if world > 1 else ()
            for op, spec, size in (*calls(case.of_rank(world), limits), *shared):
                asked = all(getattr(spec, name, allowed[0]) in allowed for name, allowed in _ONLY.items())
                if op.name != "gather_paged" and asked and _serves(size, case, world):
                    rendered = render(op, spec, chosen(op, spec, size, gpu).config)
                    found[rendered.sha] = rendered
    return list(found.values())


def _serves(size: Sizes, case: Case, world: int) -> bool:
    """Whether the case has steps in the bucket of these sizes; a rare chunk of few rows is built when it comes."""
    of_rank = (case.context // world, world * case.shape["k"]) if case.stage == "decode" else ()
    rows = (case.batch, case.batch // world) if case.stage == "decode" else (SAMPLE, case.context // case.least)
    asked = {"columns": (case.context, *of_rank), "context": (case.context, *of_rank), "rows": rows, "batch": rows}
    return all(
        any(low <= length and (high is None or length < high) for length in asked.get(name, (low,)))
        for name, low, high in size.bucket()
    )


def _processes(devices: int, arguments: tuple[Any, ...], meanwhile: Callable[[], object]) -> None:
    # CUDA does not survive a fork; without it a fork saves importing torch once more.
    context: Any = multiprocessing.get_context("spawn" if "cuda" in arguments else "fork")
    ranks = [context.Process(target=process.main, args=(rank, *arguments), daemon=True) for rank in range(devices)]
    for each in ranks:
        each.start()
    until = time.monotonic() + _LONGEST_SECONDS
    try:
        meanwhile()
        (arguments[-1] / process.BUILT).touch()
        while any(each.is_alive() for each in ranks) and time.monotonic() < until:
            time.sleep(0.05)
            failed = [(rank, each.exitcode) for rank, each in enumerate(ranks) if each.exitcode]
            if failed:  # the others would wait for it
                raise RunFailed(*failed[0])
    finally:
        for each in ranks:
            each.kill()
            each.join()


def _timed(store: Path) -> list[tuple[Case, int, Timed]]:
    path = store / "timed.pt"
    return torch.load(path, weights_only=False) if path.exists() else []


def rows_of(timed: Sequence[tuple[Case, int, Timed]], facts: Mapping[str, Any]) -> list[Row]:
    """A row for each way of ours, with one GPU and the plain way beside it."""
    times = {(case, world, each.name): each for case, world, each in timed}
    rows = []
    for case, world, each in timed:
        alone = times.get((case, 1, ALONE))
        if world == 1 or each.name.endswith(PLAIN) or alone is None:
            continue
        plain = times.get((case, world, f"{each.name}, {PLAIN}"))
        rows.append(_row(case, world, each, alone, plain, facts))
    return rows


def _row(case: Case, world: int, ours: Timed, alone: Timed, plain: Timed | None, facts: Mapping[str, Any]) -> Row:
    peers = {ALONE: alone, **({PLAIN: plain} if plain else {})}
    best = min(peers, key=lambda name: peers[name].us)
    return {
        "stage": f"{case.stage}_{ours.name}",
        "shape": {**case.shape, "ranks": world},
        "distribution": "real",
        "ours_us": round(ours.us, 2),
        "ours_variant": f"Layer(parallel={ours.name})",
        "peers": {name: round(each.us, 2) for name, each in peers.items()},
        "best_peer": best,
        "ratio": round(peers[best].us / ours.us, 4),
        "speedup": round(alone.us / ours.us, 4),
        "limit_us": round(alone.us / world, 2),
        "similarity": ours.similarity,
        "agreeing": ours.agreeing,
        "spread_us": {name: list(each.spread_us) for name, each in {"ours": ours, **peers}.items()},
        "sent_bytes": ours.sent,
        "exchange_us": round(ours.exchange_us, 2),
        "exposed_us": round(ours.exposed_us, 2),
        "plain_exchange_us": round(plain.exchange_us, 2) if plain else None,
        "graph": ours.graph,
        **facts,
    }


def measured(folder: Path, gpu_id: str) -> list[Row]:
    """The rows of a GPU's groups of any size."""
    return [row for name in groups_in(folder, gpu_id) for row in read_rows(rows_path(folder, name))]
