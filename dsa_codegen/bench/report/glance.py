"""At a glance: how many cases of every stage are won, and by how much; losses as plainly as wins."""

from __future__ import annotations

from collections.abc import Sequence

from . import labels
from .labels import Row

_VERDICTS = ("Faster in every case", "Faster in most", "As many won as lost", "Slower in most", "Slower in every case")


def glance(rows: Sequence[Row], gpu: str) -> str:
    """A line for each verdict: the stages that it holds for, with cases won and the slowest and fastest of them.

    Only beside libraries: whoever is ahead of PyTorch's own operations, one after another, has shown little.
    """
    found: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for stage, of_stage in labels.by_stage(rows).items():
        contested = [row for row in of_stage if row["peers"]]
        if any(not str(row["best_peer"]).startswith("PyTorch") for row in contested):
            found[_verdict(contested)].append(_stage(labels.TITLES[stage], contested))
    lines = [f"- **{verdict}**: {'; '.join(stages)}." for verdict, stages in found.items() if stages]
    return "\n".join([f"On one {gpu}, the best library's time over ours, case by case:", "", *lines]) if lines else ""


def _verdict(rows: Sequence[Row]) -> str:
    counts = labels.standings(rows)
    won, lost = counts[labels.WON], counts[labels.LOST]
    if len(rows) in (won, lost):
        return _VERDICTS[0] if won else _VERDICTS[-1]
    return _VERDICTS[2 + (won < lost) - (won > lost)]


def _stage(title: str, rows: Sequence[Row]) -> str:
    """``selection 0.64× – 2.46× (25 of 29 won)``."""
    ratios, won = labels.ratios(rows), labels.standings(rows)[labels.WON]
    ends = sorted({labels.ratio(ratio) for ratio in (min(ratios), max(ratios))}) if ratios else ["no time"]
    cases = f"{won} of {len(rows)} won" if 0 < won < len(rows) else f"{len(rows)} cases" if len(rows) > 1 else "one case"
    return f"{title[0].lower()}{title[1:]} {' – '.join(ends)} ({cases})"
