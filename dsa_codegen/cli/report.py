"""``report``: the page of all results, the documents' tables, and two runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .. import gpu as gpus
from ..bench import command as benchmark
from ..bench import comparison, printing, results
from ..command import show
from . import options
from .consoles import out

DOCUMENTS = ("README.md", "docs/performance-{gpu}.md", "docs/quality.md")
"""What holds tables of measured times, between markers."""
_MARKED = "A document whose marked tables are written anew; may be repeated. Otherwise README.md and docs/performance-GPU.md."


def report(
    folder: Annotated[Path, options.place("--results", help="The folder that bench writes to.")] = results.FOLDER,
    page: Annotated[Path, options.place("--out", help="The page to write.", metavar="FILE")] = results.FOLDER / "report.html",
    readme: Annotated[list[Path] | None, typer.Option(help=_MARKED)] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Whose figures the README shows; otherwise those that are newest.")] = "",
    merge: Annotated[Path | None, typer.Option(help="First take over results from another folder.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Instead, compare the ratios of two runs: files of results or folders; exit code 1 beyond 5 %."),
    ] = None,
) -> None:
    """Write one HTML page of all results, and the README's tables, from what bench has measured."""
    if compare is not None:
        _compare(compare, gpus.resolve(gpu).id if gpu else "")
    if merge is not None:
        taken = benchmark.merge(merge, folder)
        out.print(f"took over {len(taken)} rows from {merge}")
    shown = gpus.resolve(gpu).id if gpu else results.latest_gpu(folder)
    documents = readme or [Path(name.format(gpu=shown)) for name in DOCUMENTS]
    written = benchmark.write_report(folder, page, documents, shown, Path(".tune"))
    show.lines(*written, whole=True)(out)


def _compare(runs: tuple[Path, Path], gpu: str) -> NoReturn:
    first, second = (comparison.rows_of(path, gpu) for path in runs)
    found = comparison.compare(first, second)
    printing.comparison(found)(out)
    raise typer.Exit(1 if found.outside or not found.pairs else 0)
