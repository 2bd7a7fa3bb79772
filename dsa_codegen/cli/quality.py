"""``quality``: what a choice of k tokens loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import gpu as gpus
from ..bench import quality as qualities
from ..bench import report as reports
from ..bench import results
from ..command import choices, show
from . import consoles, given, options


def quality(
    activations: Annotated[
        Path | None,
        options.place(
            "--activations", help="A file of a layer's activations (quality.save); otherwise random ones.", metavar="FILE"
        ),
    ] = None,
    preset: options.Preset = "deepseek-v3.2",
    spec: options.SpecFile = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of context; may be repeated. Otherwise the longest of the file; 4096, or 131072 on a GPU."),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k", help="Tokens that a query chooses; may be repeated. Otherwise from an eighth of topk to all of it."
        ),
    ] = None,
    queries: Annotated[int, typer.Option(help="The last queries of each context.")] = 64,
    seed: Annotated[int, typer.Option(help="Of what is random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out_dir: Annotated[Path | None, options.place("--out", help="Write the rows below this folder, for report.")] = None,
    plot: Annotated[
        Path | None, options.place("--plot", help="Draw the longest context by k (needs matplotlib).", metavar="FILE.svg")
    ] = None,
    commit: Annotated[str, typer.Option(help="What the rows say they were measured at.")] = "",
    as_json: options.Json = False,
) -> None:
    """Say what choosing k tokens costs: recall, captured attention mass, error of the output; beside a sliding window."""
    contexts, model, where = context or [], given.model(preset, spec), choices.device_of(device)
    of = choices.activations(activations, model, contexts, queries, seed, where)
    found = choices.rows(of, contexts, k or [], queries, seed, None if activations else model.topk)
    plain = [row.to_dict() for row in found]
    if out_dir is not None:
        what = gpus.resolve("auto").name if where == "cuda" else "CPU"
        facts = {"date": results.now(), "commit": commit or results.commit(), "device": what}
        consoles.err.print(f"wrote {qualities.write(out_dir, found, facts)}", style="dim")
    if plot is not None:
        plot.write_text(reports.method.standalone(plain))
    consoles.show(as_json, show.quality(found), plain)
