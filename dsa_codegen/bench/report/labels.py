"""How rows are named and summed up for people."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...proof.timing import TIE
from ..cases import FP8_PRODUCTS, STAGES

Row = Mapping[str, Any]

TITLES = {
    "index_prologue": "Indexer prologue",
    "latent_prologue": "Latent prologue",
    "indexer_prefill": "Indexer, prefill",
    "indexer_decode": "Indexer, decode",
    "select": "Selection",
    "index_select_prefill": "Indexer + selection, prefill",
    "index_select_decode": "Indexer + selection, decode",
    "attention_prefill": "Sparse attention, prefill",
    "attention_prefill_paged": "Sparse attention, prefill over the FP8 cache",
    "attention_decode": "Sparse attention, decode",
    "gqa_prefill": "Sparse grouped-query attention, prefill",
    "gqa_decode": "Sparse grouped-query attention, decode",
    "model_prefill": "Sparse attention of other models, prefill",
    "model_decode": "Sparse attention of other models, decode",
    "layer_prefill": "Whole layer, prefill",
    "layer_decode": "Whole layer, decode",
    "engine_prefill": "Engine step, prefill",
    "engine_decode": "Engine step, decode",
    "attention_backward": "Sparse attention, backward",
    "indexer_backward": "Indexer, loss and gradients",
}
_ABSENT = ("is not installed", "needs a CUDA GPU", "or newer")
_USUAL = {"placed", "normal", "causal", "full", "random", "real"}
_WORDS = {FP8_PRODUCTS: "FP8 products allowed"}
WON, EVEN, LOST = "won", "even", "lost"
"""How a case stands against its best peer; even is within 1 %."""


def by_stage(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each stage that has any, in the stages' order."""
    return {stage: found for stage in STAGES if (found := [row for row in rows if row["stage"] == stage])}


def tokens(number: int) -> str:
    """``32K``, ``1M``, ``300``."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def shape(row: Row) -> str:
    """``4096 queries of 32K, 64 heads``; the distribution where it is not the usual one."""
    of: Mapping[str, int] = row["shape"]
    words = []
    if "tokens" in of:
        words.append(f"{of['tokens']} {'token' if of['tokens'] == 1 else 'tokens'}")
    for name, one in (("queries", "query"), ("rows", "row")):
        if name in of:
            words.append(f"{of[name]} {one if of[name] == 1 else name} of {tokens(of['context'])}")
    if "batch" in of:
        words.append(f"batch {of['batch']}, {tokens(of['context'])}")
        words += [f"next_n {of['next_n']}"] if of.get("next_n", 1) > 1 else []
    words += [f"{of['heads']} heads"] if "heads" in of else []
    words += [f"{of['kv_heads']} KV heads, blocks of {of['block']}"] if "kv_heads" in of else []
    if "extra_k" in of:
        words.append(f"k {of['k']} + {of['extra_k']} of two pools")
    elif of.get("k", 2048) != 2048:
        words.append(f"k {of['k']}")
    words += [f"d {of['head_dim']}"] if of.get("head_dim", 576) not in (128, 576) else []
    distribution: str = row["distribution"]
    words += [_WORDS.get(distribution, distribution)] if distribution not in _USUAL else []
    return ", ".join(words)


def microseconds(value: float | None) -> str:
    """Three digits, or more where there are more before the point."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """``1.12×``."""
    return "–" if value is None else f"{value:.2f}×"


def share_of_limit(row: Row) -> float | None:
    """The roofline's time over ours."""
    return row["limit_us"] / row["ours_us"] if row["ours_us"] and row["limit_us"] else None


def percent(value: float | None) -> str:
    """``62 %``."""
    return "–" if value is None else f"{100 * value:.0f} %"


def geomean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.geometric_mean(values) if values else None


def ratios(rows: Sequence[Row]) -> list[float]:
    """The ratios there are."""
    return [row["ratio"] for row in rows if row["ratio"]]


def standing(row: Row) -> str | None:
    """Whether a case is won, even or lost; lost too where ours has no time and a peer has. None where nobody else serves it."""
    if not row["peers"]:
        return None
    if row["ratio"] is None:
        return LOST
    return EVEN if abs(row["ratio"] - 1) <= TIE else WON if row["ratio"] > 1 else LOST


def standings(rows: Sequence[Row]) -> dict[str, int]:
    """How many cases are won, even and lost."""
    found = [standing(row) for row in rows]
    return {each: found.count(each) for each in (WON, EVEN, LOST)}


def told(rows: Sequence[Row]) -> str:
    """``3 won, 1 even, 2 lost``."""
    return ", ".join(f"{count} {name}" for name, count in standings(rows).items())


def host_cost(row: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    """What a call costs the host, in microseconds and beside ``add_`` in turns with it; rows of before have no such turns."""
    us, add_us = row["host_us"], row.get("add_us")
    beside = f"{us / add_us:.2f}" if us and add_us else "–"
    return row["what"], row["name"], microseconds(us), beside, microseconds(row["graph_us"]), row["note"]


def worst(rows: Sequence[Row]) -> Row | None:
    """The case that is furthest behind, first of all one in which ours has no time; None where nobody else serves any."""
    contested = [row for row in rows if row["peers"]]
    return min(contested, key=lambda row: row["ratio"] or 0.0, default=None)


def promises(row: Row) -> str:
    """``sglang 0.5.23; not deterministic, any order``: of which version the best peer is, and what a choice of it keeps."""
    facts = row.get("peer_facts", {}).get(row["best_peer"], {})
    words = [] if facts.get("ordered") is None else ["ordered" if facts["ordered"] else "any order"]
    if words or facts.get("deterministic") is False:
        words.insert(0, "deterministic" if facts["deterministic"] else "not deterministic")
    return "; ".join(part for part in (facts.get("version", ""), ", ".join(words)) if part)


def best_peer(row: Row) -> str:
    """``FlashMLA 3905``, or why there is no figure."""
    if row["best_peer"]:
        return f"{row['best_peer']} {microseconds(row['peers'][row['best_peer']])}"
    told = [f"{name}: {note}" for name, note in notes(row).items() if name != "ours"]
    return "; ".join(told) if told else "not served"


def notes(row: Row) -> dict[str, str]:
    """What is to be known of this case; that a library is not there at all is said once, by ``absent``."""
    return {name: note for name, note in row.get("notes", {}).items() if not _is_absence(note)}


def absent(rows: Sequence[Row]) -> dict[str, str]:
    """The peers that nobody could run, and why."""
    ran = {name for row in rows for name in row["peers"]}
    told = {name: note for row in rows for name, note in row.get("notes", {}).items() if _is_absence(note)}
    return {name: note for name, note in told.items() if name not in ran}


def absent_by_reason(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The same, those of one reason together."""
    found: dict[str, list[str]] = {}
    for name, note in absent(rows).items():
        found.setdefault(note, []).append(name)
    return found


def _is_absence(note: str) -> bool:
    return note.endswith(_ABSENT) or re.match(r"\S+ (cannot be (imported|loaded)|has no )", note) is not None
