"""What the text of an option means: a model, a GPU, a time; and which options refuse each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from .. import gpu as gpus
from ..errors import NoGpu, SpecError
from ..problem import presets
from .consoles import err

OFFLINE_GPU = "h200"
"""What ``--gpu auto`` means where there is no GPU and the command can work without one; the GPU with shipped records."""


def model(preset: str, spec: Path | None) -> presets.Model:
    """The model of ``--spec``, or else of ``--preset``."""
    return presets.load(spec) if spec else presets.preset(preset)


def gpu(name: str) -> gpus.Gpu:
    """The GPU that is meant; ``auto`` without one means the one that is compiled for offline."""
    try:
        return gpus.resolve(name)
    except NoGpu:
        err.print(f"No GPU is visible: taking {OFFLINE_GPU.upper()} as the target (--gpu names another).", style="dim")
        return gpus.resolve(OFFLINE_GPU)


def visible(name: str) -> gpus.Gpu:
    """The GPU that is here, which must be the one that is meant."""
    here = gpus.detect()
    if here is None:
        raise NoGpu("bench")
    if name != "auto" and gpus.resolve(name).id != here.id:
        raise SpecError("--gpu", name, f"auto, or {here.id}, which is here")
    return here


def seconds(text: str, option: str = "--budget") -> float:
    """``90s``, ``10m``, ``1h`` or a plain number of seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        found = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise SpecError(option, text, "a time such as 90s, 10m or 1h")
    return found


def sizes(pairs: Iterable[str]) -> dict[str, int]:
    """``queries=4096 context=32768`` as numbers by their names."""
    found: dict[str, int] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not value.isdecimal() or len(value) > 15:
            raise SpecError(name, value, "name=value with a whole number below 10^15, e.g. queries=4096")
        if name in found:
            raise SpecError(name, value, f"one value; {name}={found[name]} was given before")
        found[name] = int(value)
    return found


def stated(context: typer.Context) -> Iterator[tuple[str, str, Any]]:
    """(parameter, option, value) of what was typed, defaults left out."""
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            yield name, f"--{name.replace('_', '-')}", value
