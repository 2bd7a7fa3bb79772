"""Quality drawn: what each way of choosing captures and how far its output is from dense attention's, by k and by context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import labels
from .theme import COLOURS, WIDTH, plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "exact": "attention's own top k",
    "bf16": "indexer, unquantised",
    "fp8": "indexer, FP8 (DSA)",
    "window": "sliding window",
    "random": "any tokens",
}
_LOOKS = {
    "exact": ("ink", "-"),
    "bf16": ("series6", (0, (4, 2))),
    "fp8": ("ours", "-"),
    "window": ("series3", "-"),
    "random": ("muted", (0, (1, 2))),
}
_PANELS = (("recall", "recall"), ("mass", "mass captured"), ("error", "error of the output"))

Quality = Mapping[str, Any]


def by_k(rows: Sequence[Quality]) -> Figure:
    """Of the longest context."""
    longest = max(row["context"] for row in rows)
    return _drawn([row for row in rows if row["context"] == longest], "k", f"k of {labels.tokens(longest)} tokens")


def by_context(rows: Sequence[Quality]) -> Figure:
    """Of the k in the middle of those that were measured."""
    ks = sorted({row["k"] for row in rows})
    k = ks[len(ks) // 2]
    return _drawn([row for row in rows if row["k"] == k], "context", f"tokens of context (k {labels.tokens(k)})")


def _drawn(rows: Sequence[Quality], x: str, title: str) -> Figure:
    figure, panels = plt.subplots(3, 1, figsize=(WIDTH, 5.6), sharex=True)
    ticks = sorted({row[x] for row in rows})
    for axes, (name, text) in zip(panels, _PANELS, strict=True):
        for choice, (role, style) in _LOOKS.items():
            points = sorted((row[x], row[name]) for row in rows if row["choice"] == choice)
            if points:
                axes.plot(*zip(*points, strict=True), "o", ls=style, color=COLOURS[role], label=NAMES[choice], markersize=3)
        axes.set(xscale="log", ylabel=text)
        if name != "error":
            axes.set_ylim(-0.03, 1.03)
        axes.minorticks_off()
    panels[-1].set_xticks(ticks, [labels.tokens(tick) for tick in ticks])
    panels[-1].set_xlabel(title)
    panels[0].legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2, handletextpad=0.4, columnspacing=1.0, fontsize=7.5)
    return figure
