"""Curves: the roofline, time and memory over the context, and how tuning found its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..problems import Roofs
from ..sweep import METHODS, crossover
from . import labels
from .labels import Row
from .theme import COLOURS, WIDTH, plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHOD_NAMES = {"dense": "dense attention", "window": "sliding window", "sparse": "sparse attention (DSA)"}
_METHOD_ROLES = {"dense": "muted", "window": "series3", "sparse": "ours"}
_MARKERS = "osD^vPX*"
_HISTORIES = 12  # lines that can still be told apart


def roofline(rows: Sequence[Row], roofs: Roofs) -> Figure:
    """Arithmetic per second over arithmetic per byte; selection does no arithmetic to speak of and is left out."""
    shown = [row for row in rows if row["ours_us"] and row.get("unit") in ("fp8", "bf16") and row.get("bytes")]
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    intensities = [row["flops"] / row["bytes"] for row in shown] or [100.0]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 2 * roofs.tflops["fp8"] / roofs.bandwidth)
    for unit, role in (("fp8", "ink"), ("bf16", "muted")):
        ridge = roofs.tflops[unit] / roofs.bandwidth
        axes.plot(
            [low, ridge, high], [low * roofs.bandwidth, roofs.tflops[unit], roofs.tflops[unit]], color=COLOURS[role], lw=1.1
        )
        axes.text(
            high, roofs.tflops[unit] * 1.06, f"{unit.upper()} {roofs.tflops[unit]:.0f}", ha="right", va="bottom", fontsize=7.5
        )
    for number, (stage, found) in enumerate(labels.by_stage(shown).items()):
        role, marker = f"series{number % 6 + 1}", _MARKERS[number % 8]
        _points(axes, found, role, marker, labels.TITLES[stage])
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOPS")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.17), ncols=2, handletextpad=0.3, columnspacing=1.0)
    return figure


def _points(axes: plt.Axes, rows: Sequence[Row], role: str, marker: str, label: str) -> None:
    x = [row["flops"] / row["bytes"] for row in rows]
    axes.plot(x, [row["flops"] / row["ours_us"] / 1e6 for row in rows], marker, color=COLOURS[role], label=label)
    served = [row for row in rows if row["best_peer"]]
    x = [row["flops"] / row["bytes"] for row in served]
    y = [row["flops"] / row["peers"][row["best_peer"]] / 1e6 for row in served]
    axes.plot(x, y, marker, markerfacecolor="none", markeredgecolor=COLOURS[role], markeredgewidth=0.9)


def scaling(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds and gigabytes over the context, and where sparse attention overtakes dense."""
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 4.9), sharex=True)
    for axes, key, scale, name in zip(panels, ("us", "bytes"), (1e3, 1e9), ("ms", "GB, peak"), strict=True):
        for method in METHODS:
            points = [(row["context"], row[key] / scale) for row in rows if row["method"] == method and row[key]]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=COLOURS[_METHOD_ROLES[method]], label=_METHOD_NAMES[method])
        axes.set(xscale="log", yscale="log", ylabel=name)
        axes.minorticks_off()
    contexts = sorted({row["context"] for row in rows})
    panels[1].set_xticks(contexts, [labels.tokens(context) for context in contexts])
    panels[1].set_xlabel("tokens of context (time and memory of its last 1024 queries)")
    where = crossover(rows)
    if where:
        panels[0].axvline(where, color=COLOURS["limit"], linewidth=1.2, linestyle=(0, (3, 2)))
        panels[0].annotate(
            f"sparse is faster from {labels.tokens(round(where / 1024) * 1024)}",
            (where, panels[0].get_ylim()[1]),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=7.5,
        )
    panels[1].legend(loc="upper left")
    return figure


def tuning(histories: Sequence[Mapping[str, Any]]) -> Figure:
    """The best time so far over the best in the end, candidate by candidate."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.9))
    for number, each in enumerate(histories[:_HISTORIES]):
        best = min(each["times_us"])
        so_far, lowest = [], float("inf")
        for time_us in each["times_us"]:
            lowest = min(lowest, time_us)
            so_far.append(lowest / best)
        style = "-" if number < 6 else (0, (4, 1.5))
        axes.step(
            range(1, len(so_far) + 1),
            so_far,
            where="post",
            color=COLOURS[f"series{number % 6 + 1}"],
            ls=style,
            label=each["name"],
        )
    axes.set(xlabel="candidates timed", ylabel="best so far / best")
    axes.set_ylim(bottom=0.98)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.2), ncols=2, handletextpad=0.4, columnspacing=1.0, fontsize=7.5)
    return figure
