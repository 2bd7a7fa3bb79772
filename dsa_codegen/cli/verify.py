"""``verify``: every kernel of a model against the reference, on the GPU that is here or offline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from .. import gpu as gpus
from ..command import show, verification, waiting
from ..worker import Worker
from . import consoles, given, options

Check = Callable[..., Iterable[verification.Verdict]]
OFFLINE = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def verify(
    preset: options.Preset = "tiny",
    spec: options.SpecFile = None,
    op: options.OpNames = None,
    gpu: options.GpuName = "auto",
    repeats: Annotated[
        int, typer.Option(help="Runs on the GPU that must agree bit for bit.", min=1)
    ] = verification.GPU_REPEATS,
    as_json: options.Json = False,
) -> None:
    """Check every operation, option and template of a model against the reference; offline, interpret and compile them."""
    target = given.gpu(gpu)
    subjects = verification.subjects(given.model(preset, spec), target, op or ())
    environment, check = _way(target, repeats)
    with consoles.err.status(f"compiling {len(subjects)} sources for {target.name}"):
        verification.build_ahead(subjects, target)
    with Worker(environment) as worker:
        batches = waiting.progress(consoles.err, "verify", subjects, lambda subject: list(check(subject, target, worker)))
    verdicts = [verdict for batch in batches for verdict in batch]
    consoles.show(as_json, show.verdicts(verdicts), [show.verdict_row(verdict) for verdict in verdicts])
    raise typer.Exit(0 if all(verdict.passed for verdict in verdicts) else 1)


def _way(target: gpus.Gpu, repeats: int) -> tuple[dict[str, str], Check]:
    """The worker's environment and the check: on the GPU where one of that architecture is here."""
    here = gpus.detect()
    if here is not None and here.arch == target.arch:
        return {}, functools.partial(verification.on_gpu, repeats=repeats)
    return OFFLINE, verification.offline
