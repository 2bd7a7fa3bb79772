"""``spec``: a model as YAML, to begin one's own with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..integrations import configs
from ..problem import presets
from . import options
from .consoles import out


def spec(
    from_hf: Annotated[
        Path | None, typer.Option("--from-hf", help="The config.json of a Hugging Face checkpoint.", metavar="FILE")
    ] = None,
    preset: options.Preset = "",
    name: Annotated[str, typer.Option(help="The model's name; its model_type where absent.")] = "",
    out_file: Annotated[
        Path | None, options.place("--out", help="A YAML file to write, instead of printing.", metavar="FILE")
    ] = None,
) -> None:
    """State a model as YAML, for --spec: one that a Hugging Face config describes, or a preset to begin with."""
    if bool(from_hf) == bool(preset):
        raise typer.BadParameter("name one of --from-hf and --preset")
    model = configs.read(from_hf, name) if from_hf else presets.preset(preset)
    text = presets.dump(model)
    if out_file is None:
        print(text, end="")
    else:
        out_file.write_text(text)
        out.print(f"{model.name}: {out_file}", highlight=False)
