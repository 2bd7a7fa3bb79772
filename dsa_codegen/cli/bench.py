"""``bench``: this package's kernels against the roofline, beside peers, or over several GPUs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .. import gpu as gpus
from ..bench import command as benchmark
from ..bench import printing, results
from ..bench.campaign import Campaign
from ..bench.peers.libraries import PEER_FOLDER
from ..bench.ranks import command as on_ranks
from ..command import ours, show, waiting
from ..proof.timing import COLD, WARM, Policy
from . import consoles, given, options
from .consoles import err


def bench(
    preset: options.Preset = "deepseek-v3.2",
    spec: options.SpecFile = None,
    op: options.OpNames = None,
    warm: Annotated[bool, typer.Option("--warm", help="Leave the inputs in L2.")] = False,
    against: Annotated[str, typer.Option(help="Beside peers: all, none, or adapters such as deep_gemm,flashmla.")] = "",
    stage: Annotated[str, typer.Option(help="Only these stages, separated by commas.")] = "",
    suite: Annotated[str, typer.Option(help="Which shapes: core, distributions, flashmla, deepgemm, all.")] = "core",
    shape: Annotated[
        list[str] | None,
        typer.Option(help="In place of a suite, a shape of the one --stage: batch=96,heads=64. May be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(help="So many cases of each stage; 0 for all.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="The first case of each stage.")] = False,
    host: Annotated[bool, typer.Option("--host", help="Also what a call costs the host.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Only a layer whose work 1, 2, 4, … of all visible GPUs share.")
    ] = False,
    sweep: Annotated[str, typer.Option(help="context: also time and memory from 4K to 1M tokens.")] = "",
    budget: Annotated[str, typer.Option(help="Wall time after which nothing new begins: 240s, 10m.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what has been measured at this commit.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Hold a short run again; exit code 1 where a ratio of --out's fell by more than 5 %."),
    ] = False,
    peer_folder: Annotated[
        str,
        typer.Option(help="Files of peers that are no packages: sparse_mla_bwd.py of TileLang.", metavar="FOLDER"),
    ] = "",
    folder: Annotated[Path, options.place("--out", help="Results are merged into files below this folder.")] = results.FOLDER,
    commit: Annotated[str, typer.Option(help="What rows say they were measured at; by default the checkout's.")] = "",
    gpu: Annotated[str, typer.Option("--gpu", help="Measure only if this is the GPU that is here.")] = "auto",
    as_json: options.Json = False,
) -> None:
    """Time kernels on the GPU: this package's against the roofline, or with --against side by side with what people run."""
    if peer_folder:
        os.environ[PEER_FOLDER] = str(Path(peer_folder).resolve())
    if distributed:
        return _ranks(folder, commit, gpu, as_json)
    listed = bool(
        check or against or stage or shape or limit or quick or suite != "core" or ((budget or resume) and not (host or sweep))
    )
    if not (listed or host or sweep):
        return _ours(preset, spec, op, WARM if warm else COLD, given.visible(gpu), as_json)
    stages, per_stage = tuple(filter(None, stage.split(","))), benchmark.QUICK if quick else limit
    until = given.seconds(budget) if budget else math.inf
    request = benchmark.Request(
        against or "all", stages, suite.split(","), per_stage, folder, commit, until, resume, shapes=shape or ()
    )
    model = "" if preset == "deepseek-v3.2" else preset
    benchmark.check(request, sweep, {"--preset": model, "--spec": spec, "--op": ",".join(op or ()), "--warm": warm})
    campaign = request.campaign(given.visible(gpu))
    if check:
        _check(request, campaign, as_json)
    rows = printing.campaign(err, lambda notify: benchmark.run(request, campaign, notify)) if listed else []
    host_rows = benchmark.run_host(campaign) if host else []
    sweep_rows = benchmark.run_sweep(campaign, resume=resume) if sweep else []
    parts = [printing.rows(rows, campaign.gpu.name)] if rows else []
    parts += [printing.host(host_rows)] if host_rows else []
    parts += [printing.sweep(sweep_rows)] if sweep_rows else []
    parts += [printing.unreached(campaign.unreached, until)] if campaign.unreached else []
    consoles.show(as_json, show.together(*parts), [*rows, *host_rows, *sweep_rows])


def _ranks(folder: Path, commit: str, gpu: str, as_json: bool) -> None:
    """Seconds of building and minutes of timing, on every GPU that is here."""
    facts = {"date": results.now(), "commit": commit or results.commit(), "toolchain": benchmark.versions()}
    rows = on_ranks.run(given.visible(gpu), facts, folder)
    consoles.show(as_json, printing.ranks(rows), rows)


def _check(request: benchmark.Request, campaign: Campaign, as_json: bool) -> NoReturn:
    found = printing.campaign(err, lambda notify: benchmark.run_check(request, campaign, notify))
    consoles.show(as_json, printing.regression(found), [dataclasses.asdict(pair) for pair in found.pairs])
    raise typer.Exit(1 if found.fallen or not found.pairs else 0)


def _ours(preset: str, spec: Path | None, op: list[str] | None, policy: Policy, target: gpus.Gpu, as_json: bool) -> None:
    cases = ours.plan(given.model(preset, spec), target, op or ())
    timed = waiting.progress(err, "bench", cases, lambda need: ours.time_case(need.op, need.spec, need.case, target, policy))
    consoles.show(as_json, show.bench(timed, target, policy), [show.bench_row(row) for row in timed])
