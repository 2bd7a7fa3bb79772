"""``build``: a model's kernels compiled ahead of the machine that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..command import prebuild, show
from . import consoles, given, options


def build(
    out_dir: Annotated[Path, options.place("--out", help="Where the kernels go.")] = Path("builds"),
    preset: options.Preset = "deepseek-v3.2",
    spec: options.SpecFile = None,
    op: options.OpNames = None,
    gpu: options.GpuName = "auto",
    as_json: options.Json = False,
) -> None:
    """Compile ahead all that serving a model can call, into a folder for DSA_BUILDS; the GPU need not be here."""
    target = given.gpu(gpu)
    wanted = prebuild.calls(given.model(preset, spec), target, op or ())
    with consoles.err.status(f"compiling the kernels of {len(wanted)} calls for {target.name}"):
        done = prebuild.prebuild(wanted, target, out_dir)
    consoles.show(as_json, show.prebuilt(done, out_dir), [show.prebuilt_row(each) for each in done])
