"""The results as Markdown tables, for the README and for whoever reads results in a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .. import results
from ..cases import chosen
from ..sweep import METHODS, crossover
from . import labels
from .control import control
from .glance import glance
from .labels import Row

NAMES = ("measured", "control", "glance", "headlines", "summary", "host", "context", "ceilings")
"""What a document may ask for, beside the stages."""
_STANDINGS = (labels.WON, labels.EVEN, labels.LOST)


def summary(rows: Sequence[Row]) -> str:
    """A line per stage: cases won and lost against the best peer of each, by how much, and the share of the roofline."""
    stages = {labels.TITLES[stage]: found for stage, found in labels.by_stage(rows).items()}
    body = [_summed(title, found) for title, found in {**stages, "All": rows}.items()]
    head = ("stage", "cases", *_STANDINGS, "speed against the best peer", "from – to", "best share of the limit", "best peers")
    return markdown(head, body, right=range(1, 8))


def measured(rows: Sequence[Row], gpu: str) -> str:
    """A sentence: what was measured when, at which commits, beside which peers, and how it ended."""
    dates, commits = sorted({row["date"][:10] for row in rows}), sorted({row["commit"] for row in rows})
    facts = [facts for row in rows for facts in row.get("peer_facts", {}).values()]
    versions = sorted({version for each in facts for version in each["version"].split(", ") if version})
    beside = f" beside {', '.join(versions)}" if versions else ""
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    earlier = sum("peer_facts" not in row for row in rows)
    less = f" {earlier} of them were measured earlier, beside fewer peers." if earlier else ""
    others = sum(results.turns_of(row) == results.ALTERNATING for row in rows)
    less += f" {others} of them were timed in other turns than the rest." if 0 < others < len(rows) else ""
    here = {results.key_of(row) for row in rows}
    unmeasured = sum(case.key not in here for case in chosen())
    left = f" {unmeasured} cases of the list have no row yet." if unmeasured else ""
    return f"{len(rows)} cases on one {gpu}, {when}, at {', '.join(commits)}{beside}: {labels.told(rows)}.{less}{left}"


def _summed(title: str, rows: Sequence[Row]) -> Sequence[str]:
    ratios, counts = labels.ratios(rows), labels.standings(rows)
    shares = [share for row in rows if (share := labels.share_of_limit(row)) is not None]
    peers = sorted({row["best_peer"] for row in rows if row["best_peer"]}) if title != "All" else []
    return (
        title,
        str(len(rows)),
        *(str(counts[each]) for each in _STANDINGS),
        labels.ratio(labels.geomean(ratios)),
        f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else "–",
        labels.percent(max(shares)) if shares else "–",
        ", ".join(peers) or "–",
    )


def headlines(rows: Sequence[Row]) -> str:
    """The first case of every stage, as the list of cases has them, and beside it the case that is furthest behind."""
    first = {each.key for each in chosen(per_stage=1)}
    body = [
        (
            labels.TITLES[row["stage"]],
            labels.shape(row),
            labels.microseconds(row["ours_us"]),
            labels.best_peer(row),
            labels.ratio(row["ratio"]),
            *_worst(labels.by_stage(rows)[row["stage"]], row),
        )
        for row in rows
        if results.key_of(row) in first
    ]
    head = ("stage", "case", "µs", "best peer, µs", "ratio", "furthest behind", "µs", "best peer, µs", "ratio")
    return markdown(head, body, right=(2, 4, 6, 8))


def _worst(rows: Sequence[Row], headline: Row) -> Sequence[str]:
    row = labels.worst(rows)
    if row is None or row is headline:
        return "–" if row is None else "the same", "", "", ""
    return labels.shape(row), labels.microseconds(row["ours_us"]), labels.best_peer(row), labels.ratio(row["ratio"])


def stage(rows: Sequence[Row], name: str) -> str:
    """A line per case of one stage."""
    body = [
        (
            labels.shape(row),
            labels.microseconds(row["ours_us"]),
            labels.best_peer(row),
            labels.promises(row),
            labels.ratio(row["ratio"]),
            labels.percent(labels.share_of_limit(row)),
            row["commit"],
        )
        for row in rows
        if row["stage"] == name
    ]
    return markdown(("case", "ours, µs", "best peer, µs", "it is", "ratio", "of the limit", "commit"), body, right=(1, 4, 5))


def host(found: Sequence[Mapping[str, Any]]) -> str:
    """What a call costs the host."""
    body = [labels.host_cost(each) for each in found]
    return markdown(("call", "by", "host, µs", "× add_", "in a graph, µs", ""), body, right=(2, 3, 4))


def context(found: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory of each method over the context, and from where on the sparse layer is faster than dense attention."""
    cells = {(row["context"], row["method"]): row for row in found}
    body = [
        (labels.tokens(size), *(time_and_memory(cells.get((size, method), {})) for method in METHODS))
        for size in sorted({row["context"] for row in found})
    ]
    table = markdown(("context", "dense", "sliding window", "sparse (whole layer)"), body, right=(1, 2, 3))
    crossing = crossover(found)
    if crossing is None:
        return table
    return f"{table}\n\nSparse is faster from about {labels.tokens(round(crossing / 1024) * 1024)} tokens of context on."


def time_and_memory(row: Mapping[str, Any]) -> str:
    """Of one method at one context, or why there is neither."""
    if not row.get("us"):
        return row.get("note", "–")
    memory = f", {row['bytes'] / 1e9:.2g} GB" if row["bytes"] else ""
    return f"{row['us'] / 1e3:.3g} ms{memory}"


def ceilings(found: Mapping[str, Any]) -> str:
    """What the GPU reaches."""
    names = {
        "copy_tb_s": ("device copy, read and written", "TB/s"),
        "bf16_tflops": ("cuBLAS BF16, 8192³", "TFLOPS"),
        "fp8_tflops": ("cuBLAS FP8, 8192³", "TFLOPS"),
    }
    body = [(text, f"{found[key]:.4g} {unit}") for key, (text, unit) in names.items() if key in found]
    return markdown(("ceiling", "measured"), body, right=(1,))


def markdown(head: Sequence[str], body: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table; columns of figures to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    lines = (head, rule, *body)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def named(rows: Sequence[Row], machine: Mapping[str, Any], gpu: str = "GPU") -> dict[str, str]:
    """Every table by the name under which a README asks for it."""
    found = {
        "measured": measured(rows, gpu) if rows else "",
        "summary": summary(rows),
        "headlines": headlines(rows),
        "control": control(rows),
        "glance": glance(rows, gpu),
        **{name: stage(rows, name) for name in labels.by_stage(rows)},
    }
    if machine.get("host"):
        found["host"] = host(machine["host"]["rows"])
    if machine.get("context"):
        found["context"] = context(machine["context"]["rows"])
    if machine.get("ceilings"):
        found["ceilings"] = ceilings(machine["ceilings"])
    return found
