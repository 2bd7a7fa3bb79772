"""What ``cli.py bench`` and ``cli.py report`` do, without a command line around it."""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DsaError, SpecError, UnknownName
from ..gpu import GPUS, Gpu
from ..kernels import backends, toolchain
from ..worker import Worker
from . import ahead, cases, hostcost, peers, regression, report, results
from .campaign import Campaign, Notify
from .cases import BenchCase
from .comparison import Comparison
from .deadline import Deadline
from .problems import stage_of
from .results import Row
from .sweep import CONTEXTS, METHODS, case_of, sweep

HOST_SECONDS = 90.0
"""For one entry point; a peer may compile in it."""
SWEEP_SECONDS = 90.0
"""For one context."""
QUICK = 1
"""Cases per stage of a quick run: the headlines."""


@dataclass(frozen=True)
class Request:
    """What somebody wants measured.

    Attributes:
        against: "all", "none", or the adapters' names (deep_gemm, flashmla, …), separated by commas.
        stages, suites: which cases; all stages and the core suite where empty.
        shapes: somebody's own of the one stage, in place of suites, as ``cases.asked`` reads them.
        per_stage: so many cases of each stage; 0 for all.
        budget_s: wall seconds after which nothing new begins.
        resume: leave out what has been measured at this commit against these peers.
    """

    against: str = "all"
    stages: Sequence[str] = ()
    suites: Sequence[str] = ("core",)
    per_stage: int = 0
    folder: Path = results.FOLDER
    commit: str = ""
    budget_s: float = math.inf
    resume: bool = False
    extra: Sequence[str] = field(default=())
    """Modules with further adapters, by import path."""
    shapes: Sequence[str] = field(default=())

    def cases(self) -> list[cases.BenchCase]:
        """The cases, every stage's headline first.

        Raises:
            UnknownName: there is no such stage or suite.
            SpecError: the stages have no case in the suites; a shape that no kernel has, or that is of no one stage.
        """
        if self.shapes:
            return self._asked()
        suites = cases.SUITES if "all" in self.suites else self.suites
        found = cases.chosen(self.stages, suites, self.per_stage)
        if not found:
            have = sorted({case.suite for case in cases.chosen(self.stages, cases.SUITES)})
            raise SpecError(
                "--suite", ",".join(suites), f"those in which {', '.join(self.stages)} has cases: {', '.join(have)}"
            )
        return cases.headlines_first(found)

    def _asked(self) -> list[BenchCase]:
        if len(self.stages) != 1:
            raise SpecError("--stage", ",".join(self.stages), "one stage, whose shapes --shape names")
        found = [cases.asked(self.stages[0], text) for text in self.shapes]
        for case in found:
            stage_of(case.stage).parts(case)
        return list(dict.fromkeys(found))

    def sources(self) -> tuple[str, ...]:
        """The modules whose peers take part.

        Raises:
            UnknownName: there is no such adapter.
        """
        return (*chosen_sources(self.against), *self.extra)

    def campaign(self, gpu: Gpu, deadline: Deadline | None = None) -> Campaign:
        """A run that is ready to go."""
        commit = self.commit or results.commit()
        return Campaign(gpu, self.folder, self.sources(), commit, versions(), deadline=deadline or Deadline(self.budget_s))


def check(request: Request, sweep: str, foreign: Mapping[str, Any]) -> None:
    """Complain of a mistake before a GPU is looked for.

    Args:
        foreign: options that belong to timing this package's operations alone, with their values.

    Raises:
        UnknownName, SpecError: see ``Request``; an option that would be ignored; a sweep of something else than the context.
    """
    if sweep not in ("", "context"):
        raise SpecError("--sweep", sweep, "context")
    for name, value in foreign.items():
        if value:
            alone = "only without --against, --stage, --suite, --limit, --quick, --host and --sweep, whose cases are listed"
            raise SpecError(name, str(value), alone)
    request.cases()
    request.sources()


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


def run(request: Request, campaign: Campaign, notify: Notify) -> list[Row]:
    """Time the cases; every row has been merged into the results when it is reported."""
    campaign.notify = notify
    wanted = request.cases()
    if request.resume:
        rows = results.read_rows(results.rows_path(campaign.folder, campaign.gpu.id))
        done = results.settled(rows, campaign.commit, campaign.against)
        wanted = [case for case in wanted if case.key not in done]
    return campaign.run(wanted) if wanted else []


def run_check(request: Request, campaign: Campaign, notify: Notify) -> Comparison:
    """Hold a short run again, or what the request limits itself to, and compare it with the rows in its folder.

    The fresh rows are thrown away: a speed test changes nothing.

    Raises:
        RecordError: there is nothing to compare with.
    """
    committed = results.read_rows(results.rows_path(request.folder, campaign.gpu.id))
    if request.per_stage or request.shapes or tuple(request.suites) != ("core",):
        wanted = regression.known(map(results.key_of, committed), request.cases())
    else:
        wanted = regression.short(committed, request.stages)
    campaign.notify = notify
    with tempfile.TemporaryDirectory() as folder:
        campaign.folder = Path(folder)
        return regression.run(campaign, committed, wanted)


def run_host(campaign: Campaign) -> list[dict[str, Any]]:
    """Time what a call costs the host, entry point by entry point; what is behind is written."""
    rows: list[dict[str, Any]] = []
    ahead.build_ours(hostcost.CASES, campaign.gpu)
    with Worker() as worker:
        for job in hostcost.jobs(campaign.sources):
            if campaign.deadline.passed:
                break
            timeout = min(HOST_SECONDS, campaign.deadline.left)
            try:
                found = worker.call(hostcost.measure_host, job, campaign.gpu, campaign.sources, timeout=timeout)
            except DsaError as error:
                worker.kill()
                if campaign.deadline.passed:
                    break
                found = [hostcost.HostCost(job.name, job.what, None, None, f"failed: {error}"[:200])]
            rows += [asdict(each) for each in found]
            campaign.note(host={"rows": rows, **campaign.facts()})
    return rows


def run_sweep(campaign: Campaign, contexts: Sequence[int] = CONTEXTS, resume: bool = False) -> list[dict[str, Any]]:
    """Time everything over the context; what is behind is written."""
    rows = _swept(campaign) if resume else []
    done = {row["context"] for row in rows}
    waiting = [context for context in contexts if context not in done]
    ahead.build_ours([case_of(context) for context in waiting], campaign.gpu)
    with Worker() as worker:
        for context in waiting:
            if campaign.deadline.passed:
                break
            try:
                rows += worker.call(sweep, (context,), timeout=min(SWEEP_SECONDS, campaign.deadline.left))
            except DsaError as error:
                worker.kill()
                if campaign.deadline.passed:
                    break
                failed = {"context": context, "us": None, "bytes": None, "note": f"failed: {error}"[:200]}
                rows += [{**failed, "method": method} for method in METHODS]
            campaign.note(context={"rows": sorted(rows, key=lambda row: row["context"]), **campaign.facts()})
    return sorted(rows, key=lambda row: row["context"])


def _swept(campaign: Campaign) -> list[dict[str, Any]]:
    """The rows of the sweep that have been measured at this commit."""
    found = results.read_machine(results.machine_path(campaign.folder, campaign.gpu.id)).get("context", {})
    rows = found.get("rows", []) if found.get("commit") == campaign.commit else []
    return [row for row in rows if not row["note"].startswith("failed")]


def merge(source: Path, folder: Path) -> list[Row]:
    """Take over the results that another machine has written below ``source``."""
    fresh = []
    for gpu_id in (*results.gpus_in(source), *results.groups_in(source)):
        rows = results.read_rows(results.rows_path(source, gpu_id))
        results.merge_rows(results.rows_path(folder, gpu_id), rows)
        fresh += rows
    for path in sorted((source / "machine").glob("*.json")):
        results.merge_machine(results.machine_path(folder, path.stem), results.read_machine(path))
    return fresh


def write_report(folder: Path, out: Path, documents: Sequence[Path], gpu_id: str, state: Path) -> list[str]:
    """Write the page, and the documents' tables from one GPU's results; returns what was written, a line each."""
    from .report import tables

    page = report.write(folder, out, _histories(state))
    rows = results.read_rows(results.rows_path(folder, gpu_id))
    gpu = GPUS[gpu_id].name if gpu_id in GPUS else gpu_id
    named = tables.named(rows, results.read_machine(results.machine_path(folder, gpu_id)), gpu)
    empty = dict.fromkeys((*cases.STAGES, *tables.NAMES, "quality"), "")
    named |= report.method.quality_tables(folder)
    lines = [f"wrote {page}"]
    for document in documents:
        if document.exists():
            changed = report.update(document, {**empty, **named})
            lines.append(f"{document}: {', '.join(changed)} rewritten" if changed else f"{document}: up to date")
    method = report.method.write(folder, out.with_name("method.html"))
    if method is not None:
        lines.append(f"wrote {method}")
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
