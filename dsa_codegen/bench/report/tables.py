"""The results as Markdown tables, for the README and for whoever reads results in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import results
from ..cases import chosen
from ..sweep import METHODS, crossover
from . import labels
from .labels import Row


def summary(rows: Sequence[Row]) -> str:
    """A line per stage: against the best peer of each case, and against the roofline."""
    body = []
    for stage, found in labels.by_stage(rows).items():
        ratios = labels.ratios(found)
        shares = [share for row in found if (share := labels.share_of_limit(row)) is not None]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else "–"
        peers = sorted({row["best_peer"] for row in found if row["best_peer"]})
        best = labels.percent(max(shares)) if shares else "–"
        body.append(
            (labels.TITLES[stage], str(len(found)), labels.ratio(labels.geomean(ratios)), spread, best, ", ".join(peers) or "–")
        )
    head = ("stage", "cases", "speed against the best peer", "from – to", "best share of the limit", "best peers")
    return markdown(head, body, right=(1, 2, 3, 4))


def headlines(rows: Sequence[Row]) -> str:
    """The first case of every stage, as the list of cases has them."""
    first = {each.key for each in chosen(per_stage=1)}
    body = [
        (
            labels.TITLES[row["stage"]],
            labels.shape(row),
            labels.microseconds(row["ours_us"]),
            labels.best_peer(row),
            labels.ratio(row["ratio"]),
        )
        for row in rows
        if results.key_of(row) in first
    ]
    return markdown(("stage", "case", "µs", "best peer, µs", "ratio"), body, right=(2, 4))


def stage(rows: Sequence[Row], name: str) -> str:
    """A line per case of one stage."""
    body = [
        (
            labels.shape(row),
            labels.microseconds(row["ours_us"]),
            labels.best_peer(row),
            labels.ratio(row["ratio"]),
            labels.percent(labels.share_of_limit(row)),
            row["commit"],
        )
        for row in rows
        if row["stage"] == name
    ]
    return markdown(("case", "ours, µs", "best peer, µs", "ratio", "of the limit", "commit"), body, right=(1, 3, 4))


def host(found: Sequence[Mapping[str, Any]]) -> str:
    """What a call costs the host."""
    body = [
        (each["what"], each["name"], labels.microseconds(each["host_us"]), labels.microseconds(each["graph_us"]), each["note"])
        for each in found
    ]
    return markdown(("call", "by", "host, µs", "in a graph, µs", ""), body, right=(2, 3))


def context(found: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory of each method over the context, and from where on the sparse layer is faster than dense attention."""
    cells = {(row["context"], row["method"]): row for row in found}
    body = [
        (labels.tokens(size), *(_time_and_memory(cells.get((size, method), {})) for method in METHODS))
        for size in sorted({row["context"] for row in found})
    ]
    table = markdown(("context", "dense", "sliding window", "sparse (whole layer)"), body, right=(1, 2, 3))
    crossing = crossover(found)
    if crossing is None:
        return table
    return f"{table}\n\nSparse is faster from about {labels.tokens(round(crossing / 1024) * 1024)} tokens of context on."


def _time_and_memory(row: Mapping[str, Any]) -> str:
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


def markdown(head: Sequence[str], body: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table; columns of figures to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    lines = (head, rule, *body)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def named(rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, str]:
    """Every table by the name under which a README asks for it."""
    found = {
        "summary": summary(rows),
        "headlines": headlines(rows),
        **{name: stage(rows, name) for name in labels.by_stage(rows)},
    }
    if machine.get("host"):
        found["host"] = host(machine["host"]["rows"])
    if machine.get("context"):
        found["context"] = context(machine["context"]["rows"])
    if machine.get("ceilings"):
        found["ceilings"] = ceilings(machine["ceilings"])
    return found
