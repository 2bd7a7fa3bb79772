"""Bars: for every case of a stage our time and every peer's, with a mark where the roofline is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import labels
from .labels import Row
from .theme import COLOURS, WIDTH, plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD, _STEP, _GAP = 0.19, 0.17, 0.1  # inches of a case's name, of each of its bars, and before the next case
_BAR = 0.148  # inches
_AXIS = 0.4  # inches below the bars
_CUT = 1.2  # times the best peer's; longer bars end there
_PEERS = 4  # bars beside ours, at most


def bars(rows: Sequence[Row]) -> Figure:
    """Times relative to the best peer's; where nobody else serves a case, relative to ours."""
    timed = [row for row in rows if row["ours_us"] or row["peers"]]
    heights = [_HEAD + _STEP * (1 + len(_peers(row))) + _GAP for row in timed] or [_HEAD]
    figure, axes = plt.subplots(figsize=(WIDTH, sum(heights) + _AXIS))
    figure.subplots_adjust(left=0, right=1, top=1, bottom=_AXIS / (sum(heights) + _AXIS))
    widest, top = 1.0, 0.0
    for row, height in zip(timed, heights, strict=False):
        widest = max(widest, _case(axes, top, row))
        top += height
    axes.set_xlim(0, widest + 0.5)
    axes.set_ylim(sum(heights), 0)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    axes.set_xlabel("time relative to the best peer's (shorter is faster)")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    return figure


def _peers(row: Row) -> list[tuple[str, float]]:
    """The fastest peers and their times, the fastest first."""
    return sorted(row["peers"].items(), key=lambda peer: peer[1])[:_PEERS]


def _case(axes: plt.Axes, top: float, row: Row) -> float:
    """Draw one case; returns how far its bars reach."""
    ours, best = row["ours_us"], row["best_peer"]
    unit = row["peers"][best] if best else ours
    axes.text(0, top + _HEAD / 2, labels.shape(row), va="center", ha="left", color=COLOURS["ink"], fontsize=8.5)
    y = top + _HEAD + _STEP / 2
    longest = 0.0
    if ours:
        note = labels.ratio(row["ratio"]) if best else "no peer"
        longest = _bar(axes, y, ours / unit, "ours", f"{labels.microseconds(ours)} µs · {note}", weight="bold")
        if row["limit_us"]:
            at = min(row["limit_us"] / unit, _CUT)
            axes.vlines(at, y - _BAR * 0.62, y + _BAR * 0.62, color=COLOURS["limit"], linewidth=2, zorder=2.5)
    else:
        reason = row.get("notes", {}).get("ours", "not run")
        axes.text(0.01, y, reason[:64], va="center", color=COLOURS["limit"], fontsize=7.5)
    for name, us in _peers(row):
        y += _STEP
        role = "peer" if name == best else "other"
        longest = max(longest, _bar(axes, y, us / unit, role, f"{labels.microseconds(us)} µs", name=name))
    return longest


def _bar(axes: plt.Axes, y: float, length: float, role: str, note: str, name: str = "", weight: str = "normal") -> float:
    shown = min(length, _CUT)
    axes.barh(y, shown, height=_BAR, color=COLOURS[role])
    axes.text(0.012, y + 0.004, name, va="center", ha="left", color=COLOURS["ink"], fontsize=7.5)
    cut = "» " if length > _CUT else ""
    axes.text(shown + 0.015, y + 0.004, cut + note, va="center", color=COLOURS["ink"], fontsize=8, fontweight=weight)
    return shown
