"""``generate``: a model's kernels as files to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command import generate as generation
from ..command import show
from ..kernels import backends
from . import consoles, given, options


def generate(
    out_dir: Annotated[Path, options.place("--out", help="Where the modules go.")] = Path("generated"),
    preset: options.Preset = "deepseek-v3.2",
    spec: options.SpecFile = None,
    op: options.OpNames = None,
    gpu: options.GpuName = "auto",
    backend: Annotated[str, typer.Option(help=f"Only this backend: {', '.join(backends.NAMES)}.")] = "",
    as_json: options.Json = False,
) -> None:
    """Write the rendered kernels of a model to a folder, as Python modules to read, step through or ship."""
    written = generation.generate(given.model(preset, spec), given.gpu(gpu), out_dir, op or (), backend)
    consoles.show(as_json, show.generated(written), [show.generated_row(each) for each in written])
