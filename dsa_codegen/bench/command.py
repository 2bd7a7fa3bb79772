"""What ``cli.py bench`` and ``cli.py report`` do, without a command line around it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import backends, toolchain
from ..errors import DsaError, UnknownName
from ..gpu import Gpu
from ..worker import Worker
from . import cases, peers, report, results
from .campaign import Campaign, Notify
from .hostcost import measure_host
from .results import Row
from .sweep import sweep

HOST_SECONDS = 180.0
SWEEP_SECONDS = 300.0
QUICK = 1
"""Cases per stage of a quick run: the headlines."""


@dataclass(frozen=True)
class Request:
    """What somebody wants measured.

    Attributes:
        against: "all", "none", or the adapters' names (deep_gemm, flashmla, …), separated by commas.
        stages, suites: which cases; all stages and the core suite where empty.
        per_stage: so many cases of each stage; 0 for all.
    """

    against: str = "all"
    stages: Sequence[str] = ()
    suites: Sequence[str] = ("core",)
    per_stage: int = 0
    folder: Path = results.FOLDER
    commit: str = ""
    extra: Sequence[str] = field(default=())
    """Modules with further adapters, by import path."""

    def cases(self) -> list[cases.BenchCase]:
        """The cases."""
        suites = cases.SUITES if "all" in self.suites else self.suites
        return cases.chosen(self.stages, suites, self.per_stage)

    def sources(self) -> tuple[str, ...]:
        """The modules whose peers take part."""
        return (*chosen_sources(self.against), *self.extra)

    def campaign(self, gpu: Gpu) -> Campaign:
        """A run that is ready to go."""
        return Campaign(gpu, self.folder, self.sources(), self.commit or results.commit(), versions())


def chosen_sources(against: str) -> tuple[str, ...]:
    """The adapters that a word means.

    Raises:
        UnknownName: there is no adapter of that name.
    """
    known = {source.rpartition(".")[2]: source for source in peers.sources()}
    if against in ("all", "none"):
        return tuple(known.values()) if against == "all" else ()
    for name in against.split(","):
        if name not in known:
            raise UnknownName("peer", name, ("all", "none", *known))
    return tuple(known[name] for name in against.split(","))


def run(request: Request, gpu: Gpu, notify: Notify) -> list[Row]:
    """Time the cases; every row has been merged into the results when it is reported."""
    campaign = request.campaign(gpu)
    campaign.notify = notify
    return campaign.run(request.cases())


def run_host(request: Request, gpu: Gpu) -> list[dict[str, Any]]:
    """Time what a call costs the host."""
    campaign = request.campaign(gpu)
    with Worker() as worker:
        rows = [asdict(each) for each in worker.call(measure_host, gpu, campaign.sources, timeout=HOST_SECONDS)]
    campaign.note(host={"rows": rows, **campaign.facts()})
    return rows


def run_sweep(request: Request, gpu: Gpu) -> list[dict[str, Any]]:
    """Time everything over the context."""
    campaign = request.campaign(gpu)
    with Worker() as worker:
        rows: list[dict[str, Any]] = worker.call(sweep, timeout=SWEEP_SECONDS)
    campaign.note(context={"rows": rows, **campaign.facts()})
    return rows


def merge(source: Path, folder: Path) -> list[Row]:
    """Take over the results that another machine has written below ``source``."""
    fresh = []
    for gpu_id in results.gpus_in(source):
        rows = results.read_rows(results.rows_path(source, gpu_id))
        results.merge_rows(results.rows_path(folder, gpu_id), rows)
        fresh += rows
    for path in sorted((source / "machine").glob("*.json")):
        results.merge_machine(results.machine_path(folder, path.stem), results.read_machine(path))
    return fresh


def write_report(folder: Path, out: Path, readme: Path | None, gpu_id: str, state: Path) -> list[str]:
    """Write the page, and the README's tables from one GPU's results; returns what was written, a line each."""
    page = report.write(folder, out, _histories(state))
    lines = [f"wrote {page}"]
    if readme is not None and readme.exists():
        from .report import tables

        rows = results.read_rows(results.rows_path(folder, gpu_id))
        named = tables.named(rows, results.read_machine(results.machine_path(folder, gpu_id)))
        empty = dict.fromkeys((*cases.STAGES, "host", "ceilings"), "")
        changed = report.update(readme, {**empty, **named})
        lines.append(f"{readme}: {', '.join(changed)} rewritten" if changed else f"{readme}: up to date")
    return lines


def versions() -> dict[str, str]:
    """Versions of this package's compilers, torch, CUDA and driver, of whatever is installed."""
    found: dict[str, str] = {}
    for backend in backends.NAMES:
        try:
            found |= toolchain.versions(backend)
        except (ImportError, DsaError):
            continue
    return found


def _histories(state: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        importlib.metadata.version("optuna")
    except importlib.metadata.PackageNotFoundError:
        return {}
    from ..tune.history import histories

    return histories(state)
