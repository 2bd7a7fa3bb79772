"""The options that several commands have, each declared once with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import gpu as gpus
from .. import ops
from ..kernels import backends
from ..problem import presets


def place(name: str, help: str, metavar: str = "FOLDER") -> Any:
    """The option ``name`` of a folder or file; nothing at all would silently be the current folder.

    The name is stated, as typer 0.27.0 would make ``--FOLDER`` of the metavar.
    """
    return typer.Option(name, help=help, parser=_place, metavar=metavar)


def _place(text: str) -> Path:
    if not text:
        raise typer.BadParameter("nothing is named; name a place, or leave the option out")
    return Path(text)


Preset = Annotated[str, typer.Option(help=f"A model: {', '.join(presets.names())}.")]
SpecFile = Annotated[Path | None, typer.Option("--spec", help="A YAML file that states a model, instead of --preset.")]
OpNames = Annotated[
    list[str] | None, typer.Option("--op", help=f"Only this operation ({', '.join(ops.all_ops())}); may be repeated.")
]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", help=f"Only this backend ({', '.join(backends.NAMES)}); may be repeated.")
]
GpuName = Annotated[str, typer.Option("--gpu", help=f"auto, or one of {', '.join(gpus.GPUS)}.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
