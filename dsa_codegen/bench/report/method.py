"""The method's page: dense attention, a sliding window and sparse attention by time, memory and quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ...errors import ToolMissing
from ...gpu import GPUS
from ...invocation import install
from .. import results
from ..quality import read
from ..sweep import METHODS
from . import labels, tables
from .tables import markdown

_FOLDER = Path(__file__).parent
_COLUMNS = ("context", "k", "choice", "recall", "hits", "mass", "error", "overlap")


def write(folder: Path, out: Path) -> Path | None:
    """Write the page of the sweeps and of the measured quality below ``folder``; None where there is neither.

    Raises:
        RecordError: results cannot be read.
        ToolMissing: matplotlib is not installed.
    """
    sweeps, found = list(_sweeps(folder)), read(folder)
    if not sweeps and not found:
        return None
    loader = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("method.html.jinja")
    kinds = [_kind(each, number) for number, each in enumerate(found)]
    out.write_text(page.render(sweeps=sweeps, kinds=kinds, labels=labels, methods=METHODS, columns=_COLUMNS))
    return out


def _sweeps(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each GPU that has one: its name, the picture, the rows by context."""
    for gpu in results.gpus_in(folder):
        swept = results.read_machine(results.machine_path(folder, gpu)).get("context")
        if not swept:
            continue
        rows = swept["rows"]
        cells = {(row["context"], row["method"]): row for row in rows}
        body = [
            [labels.tokens(size), *(tables.time_and_memory(cells.get((size, method), {})) for method in METHODS)]
            for size in sorted({row["context"] for row in rows})
        ]
        name = GPUS[gpu].name if gpu in GPUS else gpu
        picture = drawn("curves", "scaling", rows, f"{gpu}-scaling", f"{name}: time and memory over the context")
        yield {"name": name, "picture": picture, "body": body, "date": swept["date"][:10], "commit": swept["commit"]}


def _kind(found: Mapping[str, Any], number: int) -> dict[str, Any]:
    rows = found["rows"]
    name = rows[0]["data"]
    pictures = [drawn("quality", "by_k", rows, f"quality-{number}-k", f"{name}: quality by k")]
    if len({row["context"] for row in rows}) > 1:
        pictures.append(drawn("quality", "by_context", rows, f"quality-{number}-context", f"{name}: quality by context"))
    return {"name": name, "facts": found["facts"], "rows": rows, "pictures": pictures}


def drawn(module: str, function: str, rows: Sequence[Mapping[str, Any]], name: str, title: str) -> str:
    """A figure as inline SVG.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    try:
        from . import curves, quality, theme
    except ImportError as error:
        raise ToolMissing("matplotlib", install("bench")) from error
    maker = getattr({"curves": curves, "quality": quality}[module], function)
    return theme.drawn(lambda: maker(rows), name, title)


def standalone(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure by k as a picture of its own, in colours of its own.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    picture = drawn("quality", "by_k", rows, "quality", f"{rows[0]['data']}: quality by k")
    from . import theme

    return theme.standalone(picture)


def quality_tables(folder: Path) -> dict[str, str]:
    """``{"quality": …}``: for each kind of activations and context the choices at each k; empty where nothing was measured."""
    parts = []
    for each in read(folder):
        rows = each["rows"]
        body = [_cells(rows, context, k) for context in sorted({row["context"] for row in rows}) for k in _ks(rows, context)]
        head = ("context", "k", "attention's own", "indexer, FP8", "sliding window", "any", "FP8 = unquantised")
        facts = each["facts"]
        about = f"**{rows[0]['data']}** ({facts['device']}, {facts['date'][:10]}, at {facts['commit']})"
        parts.append(f"{about}\n\n{markdown(head, body, right=range(7))}")
    return {"quality": "\n\n".join(parts)}


def _ks(rows: Sequence[Mapping[str, Any]], context: int) -> list[int]:
    return sorted({row["k"] for row in rows if row["context"] == context})


def _cells(rows: Sequence[Mapping[str, Any]], context: int, k: int) -> list[str]:
    """Mass and error of each choice, of the indexer also its recall."""
    by = {row["choice"]: row for row in rows if row["context"] == context and row["k"] == k}

    def told(choice: str) -> str:
        row = by.get(choice)
        if row is None:
            return "–"
        recall = f"{row['recall']:.3f}, " if choice == "fp8" else ""
        return f"{recall}{row['mass']:.3f}, {row['error']:.3f}"

    overlap = by["fp8"]["overlap"] if "fp8" in by else None
    shared = "–" if overlap is None else labels.percent(overlap)
    return [labels.tokens(context), str(k), *(told(choice) for choice in ("exact", "fp8", "window", "random")), shared]
