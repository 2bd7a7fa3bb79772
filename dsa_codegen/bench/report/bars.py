"""Bars: for every case of a stage our time and the best peer's, with a mark where the roofline is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import labels
from .labels import Row
from .theme import COLOURS, WIDTH, plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW = 0.56  # inches per case
_LONGEST = 2.0  # times the best peer's; longer bars are cut there
_BAR = 0.26


def bars(rows: Sequence[Row]) -> Figure:
    """Times relative to the best peer's; where nobody else serves a case, relative to ours."""
    timed = [row for row in rows if row["ours_us"] or row["peers"]]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.5 + _ROW * max(len(timed), 1)))
    widest = 1.0
    for place, row in enumerate(timed):
        widest = max(widest, _case(axes, place, row))
    axes.set_xlim(0, widest * 1.32)
    axes.set_ylim(len(timed) - 0.35, -0.75)
    axes.set_yticks([])
    axes.set_xlabel("time relative to the best peer's (shorter is faster)")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    return figure


def _case(axes: plt.Axes, place: int, row: Row) -> float:
    ours, best = row["ours_us"], row["best_peer"]
    unit = row["peers"][best] if best else ours
    longest = 0.0
    axes.text(0, place - 0.36, labels.shape(row), va="center", ha="left", color=COLOURS["ink"], fontsize=8.5)
    if ours:
        note = f"{labels.microseconds(ours)} µs" + (f" · {labels.ratio(row['ratio'])}" if best else " · no peer")
        longest = max(longest, _bar(axes, place - 0.05, ours / unit, "ours", note, bold=True))
    else:
        axes.text(0.01, place - 0.05, row.get("notes", {}).get("ours", "not run")[:60], va="center", color=COLOURS["muted"])
    if best:
        note = f"{labels.microseconds(unit)} µs · {best}"
        longest = max(longest, _bar(axes, place + 0.24, 1.0, "peer", note))
    if row["limit_us"]:
        at = row["limit_us"] / unit
        axes.plot(
            [at, at], [place - 0.2, place + 0.39], color=COLOURS["limit"], linewidth=1.6, solid_capstyle="butt", zorder=2.5
        )
    return longest


def _bar(axes: plt.Axes, y: float, length: float, role: str, note: str, bold: bool = False) -> float:
    shown = min(length, _LONGEST)
    axes.barh(y, shown, height=_BAR, color=COLOURS[role])
    weight = "bold" if bold else "normal"
    inside = shown > 0.55 and len(note) * 0.021 < shown
    x, align = (shown - 0.015, "right") if inside else (shown + 0.015, "left")
    colour = "paper" if inside and role == "ours" else "ink"
    axes.text(x, y + 0.01, note, va="center", ha=align, color=COLOURS[colour], fontsize=8, fontweight=weight)
    return shown
