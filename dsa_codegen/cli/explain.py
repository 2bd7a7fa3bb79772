"""``explain``: why this record serves a call, or none does."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .. import ops
from ..command import show
from ..invocation import command
from ..ops import needs
from ..records import explain as explanation
from ..runtime import dispatch
from . import consoles, given, options

SIZES = "Sizes as name=value, all or none (then those that people serve). " + "; ".join(
    f"{op.name}: {' '.join(f'{field.name}=…' for field in dataclasses.fields(op.sizes_type))}" for op in ops.all_ops().values()
)


def explain(
    op: Annotated[str, typer.Option("--op", help="The operation.")],
    sizes: Annotated[list[str] | None, typer.Argument(help=SIZES)] = None,
    preset: options.Preset = "deepseek-v3.2",
    spec: options.SpecFile = None,
    gpu: options.GpuName = "auto",
    as_json: options.Json = False,
) -> None:
    """Say which record serves a call, or field by field why none does."""
    operation = ops.get(op)
    stated = operation.sizes_type.from_dict(given.sizes(sizes)) if sizes else None
    target, model = given.gpu(gpu), given.model(preset, spec)
    if stated is None:
        calls = [(need.spec, need.case.sizes) for need in needs.needs(model, [op], target)]
    else:
        calls = [(each, stated) for _, each in needs.specs(model, [op], target)]
    printers, rows = [], []
    for each, size in calls:
        answer = each, dispatch.chosen(operation, each, size, target), explanation.explain(operation, each, size, target)
        printers.append(show.explanation(operation, size, target, [answer]))
        rows.append({"sizes": size.to_dict(), **show.explanation_row(*answer)})
    if any(row["origin"] == "default" for row in rows):
        state = f"--spec {spec}" if spec else f"--preset {preset}"
        printers.append(show.lines(f"Tune it: {command()} tune --gpu {target.id} --op {op} {state}"))
    consoles.show(as_json, show.together(*printers), rows)
