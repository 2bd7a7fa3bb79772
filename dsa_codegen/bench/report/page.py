"""The page: everything that was measured of the GPUs, in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ...errors import ToolMissing
from ...gpu import GPUS, Gpu, resolve
from ...invocation import install
from .. import results
from ..ceilings import roofs
from ..ranks.command import measured
from . import labels
from .labels import Row

_FOLDER = Path(__file__).parent


def write(folder: Path, out: Path, histories: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> Path:
    """Write the page of all results below ``folder``.

    Args:
        histories: for a GPU's id, what ``tune.history`` says of each study that tuning has gone through.

    Raises:
        RecordError: there are no results, or they cannot be read.
        ToolMissing: matplotlib is not installed.
    """
    newest = results.latest_gpu(folder)
    names = [newest, *(name for name in results.gpus_in(folder) if name != newest)]
    gpus = [_gpu(folder, name, (histories or {}).get(name, ())) for name in names]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.jinja").render(gpus=gpus, labels=labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    return out


def _gpu(folder: Path, name: str, histories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = results.read_rows(results.rows_path(folder, name))
    machine = results.read_machine(results.machine_path(folder, name))
    gpu = resolve(name) if name in GPUS else None
    return {
        "id": name,
        "name": gpu.name if gpu else name,
        "rows": rows,
        "machine": machine,
        "stages": [_stage(name, stage, found) for stage, found in labels.by_stage(rows).items()],
        "curves": [*_curves(name, gpu, rows, machine, histories), *_several(name, measured(folder, name))],
        "commits": sorted({row["commit"] for row in rows}),
        "dates": [row["date"][:10] for row in sorted(rows, key=lambda row: row["date"])],
        "toolchain": max(rows, key=lambda row: row["date"])["toolchain"] if rows else {},
    }


def _stage(gpu_id: str, stage: str, rows: Sequence[Row]) -> dict[str, Any]:
    ratios = labels.ratios(rows)
    title = labels.TITLES[stage]
    return {
        "name": stage,
        "title": title,
        "rows": rows,
        "geomean": labels.geomean(ratios),
        "picture": _drawn("bars", "bars", rows, name=f"{gpu_id}-{stage}", title=f"{title}: times of ours and the best peer"),
    }


def _curves(
    gpu_id: str, gpu: Gpu | None, rows: Sequence[Row], machine: Mapping[str, Any], histories: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, str]]:
    def curve(kind: str, title: str, text: str, *args: Any) -> dict[str, str]:
        return {"title": title, "text": text, "picture": _drawn("curves", kind, *args, name=f"{gpu_id}-{kind}", title=title)}

    if labels.ratios(rows):
        text = "A dot is a case; right of the line ours is faster. The bar is the geometric mean, printed at the right."
        yield curve("glance", "At a glance", text, rows)
    if gpu is not None:
        text = "Filled: ours; hollow: the best peer. The roofs are what this GPU reached with a copy and with cuBLAS."
        yield curve("roofline", "Roofline", text, rows, roofs(machine.get("ceilings", {}), gpu))
    if machine.get("context"):
        text = "Dense attention grows with the context, sparse attention with the indexer's far smaller share of it."
        yield curve("scaling", "Time and memory over the context", text, machine["context"]["rows"])
    searched = [each for each in histories if len(each["times_us"]) > 1]
    if searched:
        yield curve("tuning", "Tuning", "How soon each search came near its best.", searched)
    weighed = [each for each in searched if each.get("importance")]
    if weighed:
        text = "The share of each tuning parameter in how far the times of a search's candidates differ (correlation ratios)."
        yield curve("importance", "What mattered", text, weighed)


def _several(gpu_id: str, rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Where groups of this GPU have been timed."""
    if rows:
        title, most = "Several GPUs", max(row["shape"]["ranks"] for row in rows)
        text = (
            f"Speed-up of a layer. Lines: a model of H100s (docs/scaling.md); points: measured on up to {most}; hollow: plain, "
            "grey: in proportion to the GPUs."
        )
        yield {"title": title, "text": text, "picture": _drawn("curves", "ranks", rows, name=f"{gpu_id}-ranks", title=title)}


def _drawn(module: str, function: str, *args: Any, name: str, title: str) -> str:
    try:
        from . import bars, curves, theme
    except ImportError as error:
        raise ToolMissing("matplotlib", install("bench")) from error
    maker = getattr({"bars": bars, "curves": curves}[module], function)
    return theme.drawn(lambda: maker(*args), name, title)
