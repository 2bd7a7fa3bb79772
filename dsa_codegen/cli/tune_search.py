"""What ``tune`` does where no option says otherwise: the search, what it found, and what to type where it ended too early."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from .. import gpu as gpus
from .. import ops
from ..command import show, show_tuning, waiting
from ..errors import SpecError, UnknownName
from ..invocation import command
from ..ops import needs
from ..tune import effort as efforts
from ..tune import run
from ..tune.cluster import Cluster
from ..tune.lock import Patience
from ..tune.plan import Budget, Report
from . import consoles, given
from .consoles import err


@dataclass(frozen=True)
class Asked:
    """The options of a search, as they were typed."""

    preset: str
    spec: Path | None
    ops: Sequence[str]
    backends: Sequence[str]
    gpu: str
    gpus: int
    """How many of this host share the search; 0 for all."""
    ray: str
    storage: str
    budget: str
    trials: int
    effort: str
    seed: int
    fresh: bool
    missing: bool
    wait: str


@dataclass(frozen=True)
class Place:
    """Where a search happens: for which GPU, and on what."""

    gpu: gpus.Gpu
    offline: bool
    """That GPU is not here: candidates are compiled and ranked by a model."""
    cluster: Cluster | None


def search(asked: Asked, folder: Path, as_json: bool) -> None:
    """Tune a model's operations into ``folder``; exits with 0 only where every call has a record."""
    place = _place(asked)
    effort = efforts.effort(asked.effort)
    usual = effort.budget(place.offline)
    budget = Budget(given.seconds(asked.budget) if asked.budget else usual.wall_s, asked.trials or usual.trials)
    report = waiting.tuning(
        err,
        lambda notify: run.tune(
            needs.specs(given.model(asked.preset, asked.spec), asked.ops, place.gpu),
            place.gpu,
            folder,
            budget=budget,
            effort=effort,
            offline=place.offline,
            backends=_known(asked.backends, asked.ops),
            seed=asked.seed,
            fresh=asked.fresh,
            missing=asked.missing,
            storage=asked.storage,
            cluster=place.cluster,
            patience=_patience(asked.wait),
            devices=[""] if place.offline else _devices(place.gpu, asked.gpus),
            notify=notify,
        ),
    )
    consoles.show(as_json, show_tuning.tuned(report), [show.record_row(record) for record in report.records])
    if report.missing:
        state = f"--spec {shlex.quote(str(asked.spec))}" if asked.spec else f"--preset {asked.preset}"
        again = f"{command()} tune --gpu {place.gpu.id} {state}"
        show_tuning.missing(report.missing, again, _longer(budget.wall_s, usual.wall_s))(err)
    raise typer.Exit(_exit_code(report))


def _place(asked: Asked) -> Place:
    cluster = _join(asked.ray) if asked.ray else None
    here = cluster.detect() if cluster else gpus.detect()
    target = here if here and cluster and asked.gpu == "auto" else given.gpu(asked.gpu)
    if here is not None and here.id == target.id:
        return Place(here, False, cluster)  # with the limits that the device has
    if cluster and not cluster.offline:
        raise SpecError("--gpu", asked.gpu, f"{here.id if here else 'auto'}, which the cluster's hosts have")
    return Place(target, True, cluster)


def _join(address: str) -> Cluster:
    with err.status("joining the cluster"):
        return Cluster(address)


def _known(names: Sequence[str], op_names: Sequence[str]) -> Sequence[str]:
    """The backends that were named, each one that an operation has templates of."""
    able = {name for op in map(ops.get, op_names or ops.all_ops()) for name in op.backends}
    for name in names:
        if name not in able:
            raise UnknownName(f"backend of {', '.join(op_names) or 'any operation'}", name, sorted(able))
    return names


def _patience(wait: str) -> Patience:
    """Waits for other runs, and says so."""
    seconds = 0.0 if wait in ("0", "0s") else given.seconds(wait, "--wait")
    return Patience(seconds, lambda path: err.print(f"waiting for another tuning run, which is using {path}", highlight=False))


def _devices(target: gpus.Gpu, most: int) -> Sequence[str]:
    """The GPUs that share a search; where it is one, the process's own."""
    found = gpus.alike(target)[: most or None]
    return found if len(found) > 1 else [""]


def _exit_code(report: Report) -> int:
    """What a run of the tuner says to whoever called it."""
    if report.interrupted:
        return 130
    if any(each.failed for each in report.missing):
        return 1
    return 4 if report.missing else 0


def _longer(had_s: float | None, usual_s: float | None) -> str:
    """A budget to try next: the usual one, or twice what was not enough."""
    usual = usual_s or 0.0
    return f"{math.ceil((usual if had_s is None or had_s < usual else 2 * had_s) / 60)}m"
