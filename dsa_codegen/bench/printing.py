"""How the command line shows a benchmark: one bar while it runs, a line for each row as it is written, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..command.show import Printer, lines, table, together
from .campaign import Notify
from .cases import BenchCase
from .comparison import Comparison
from .report import labels
from .results import Row

_Found = TypeVar("_Found")


def campaign(console: Console, run: Callable[[Notify], _Found]) -> _Found:
    """Run under a bar that says which case is being held and how long the rest will take."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)

        def notify(what: str, done: int, of: int, row: Row | None) -> None:
            bar.update(task, description=what, completed=done, total=of)
            if row is not None:
                console.print(line(row), highlight=False, markup=False, soft_wrap=True)

        return run(notify)


def line(row: Row) -> str:
    """``select: 64 rows of 8K: 6.1 µs, fast_topk 9.8, 1.61×``, and who could not take part."""
    ours = f"{labels.microseconds(row['ours_us'])} µs" if row["ours_us"] else "no time"
    peers = "".join(f", {name} {labels.microseconds(us)}" for name, us in row["peers"].items())
    ratio = f", {labels.ratio(row['ratio'])}" if row["ratio"] else ""
    notes = "".join(f"\n  {name}: {note}" for name, note in labels.notes(row).items())
    return f"{row['stage']}: {labels.shape(row)}: {ours}{peers}{ratio}{notes}"


def rows(found: Sequence[Row], title: str) -> Printer:
    """One table of everything, stage by stage, and who was missing everywhere."""
    body = [
        (
            row["stage"],
            labels.shape(row),
            labels.microseconds(row["ours_us"]),
            labels.microseconds(row["warm_us"].get("ours")) if row["warm_us"] else "",
            labels.best_peer(row),
            labels.ratio(row["ratio"]),
            labels.percent(labels.share_of_limit(row)),
            row["commit"],
        )
        for row in found
    ]
    columns = ("stage", "case", "ours µs", "warm µs", "best peer µs", "# ratio", "limit %", "commit")
    return together(table(title, columns, body), _summary(found))


def unreached(cases: Sequence[BenchCase], budget_s: float) -> Printer:
    """What the budget left."""
    return lines(f"{len(cases)} cases were not reached within {budget_s:.0f} s; the same command with --resume measures them")


NEAREST = 10
"""How many ratios are shown where all agree: those that differ most."""


def comparison(found: Comparison, what: str = "") -> Printer:
    """Two files of results beside each other, the ratios that differ most first: all beyond the limit, and which times moved.

    Args:
        what: the title; by default how many differ.
    """
    shown = found.outside or found.pairs[:NEAREST]
    body = [
        (f"{each.stage}: {each.shape}", labels.ratio(each.first), labels.ratio(each.second), f"{100 * each.difference:+.1f} %")
        for each in shown
    ]
    title = what or f"{len(found.pairs)} ratios in both; {len(found.outside)} differ by more than {100 * found.limit:g} %"
    why = lines(*(f"{each.stage}: {each.shape}: {each.why} µs" for each in found.outside))
    rest = len(found.pairs) - len(shown)
    more = lines(*([f"{rest} more differ by {100 * abs(found.pairs[len(shown)].difference):.1f} % at most"] if rest else []))
    alone = lines(*(f"only in one: {text}" for text in found.alone))
    unlike = lines(*(f"{count} were timed in other turns: {one}, then {two}" for (one, two), count in found.unlike.items()))
    return together(table(title, ("case", "# first", "# second", "# difference"), body), more, why, alone, unlike)


def regression(found: Comparison) -> Printer:
    """A fresh short run beside the committed rows."""
    much = f"{100 * found.limit:g} %"
    return comparison(found, f"{len(found.pairs)} ratios held again; {len(found.fallen)} fell by more than {much}")


def _summary(found: Sequence[Row]) -> Printer:
    """Stage by stage: cases won, even and lost, and by how much."""
    stages = {labels.TITLES[stage]: each for stage, each in labels.by_stage(found).items()}
    body = []
    for title, each in {**stages, "all": found}.items():
        ratios, counts = labels.ratios(each), labels.standings(each)
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else "–"
        cells = (str(len(each)), *(str(count) for count in counts.values()), labels.ratio(labels.geomean(ratios)), spread)
        body.append((title, *cells))
    columns = ("stage", "# cases", *(f"# {name}" for name in labels.standings(())), "# geometric mean", "# from – to")
    return table("against the best peer of each case", columns, body)


def host(found: Sequence[Mapping[str, Any]]) -> Printer:
    """What a call costs the host."""
    body = [labels.host_cost(each) for each in found]
    return table(
        "a call: the host's time, and the device's in a graph", ("call", "by", "host µs", "× add_", "graph µs", "note"), body
    )


def sweep(found: Sequence[Mapping[str, Any]]) -> Printer:
    """Time and memory over the context."""
    body = [
        (labels.tokens(row["context"]), row["method"], _over(row["us"], 1e3), _over(row["bytes"], 1e9), row["note"])
        for row in found
    ]
    return table("the last 1024 queries of a context", ("context", "method", "# ms", "# peak GB", "note"), body)


def ranks(found: Sequence[Mapping[str, Any]]) -> Printer:
    """A layer on several GPUs beside one, and beside the plain way of sharing it."""
    body = [
        (
            row["stage"],
            labels.shape(row),
            str(row["shape"]["ranks"]),
            labels.microseconds(row["ours_us"]),
            *(labels.microseconds(row["peers"].get(name)) for name in ("one GPU", "plain")),
            labels.ratio(row["speedup"]),
            labels.microseconds(row["exchange_us"]),
            labels.microseconds(row["exposed_us"]),
        )
        for row in found
    ]
    columns = ("stage", "case", "# GPUs", "# µs", "# one GPU µs", "# plain µs", "# speed-up", "# exchange µs", "# it adds µs")
    return table("a layer on several GPUs", columns, body)


def _over(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value / unit:.3g}"
