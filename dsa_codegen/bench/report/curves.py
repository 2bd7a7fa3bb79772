"""Curves: the roofline, time and memory over the context, and how tuning found its way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..problems import Roofs
from ..ranks import model
from ..sweep import METHODS, crossover
from . import labels
from .labels import Row
from .theme import COLOURS, WIDTH, plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHOD_NAMES = {"dense": "dense attention", "window": "sliding window", "sparse": "sparse attention (DSA)"}
_METHOD_ROLES = {"dense": "muted", "window": "series3", "sparse": "ours"}
_MARKERS = "osD^vPX*"
_RATIOS = (0.25, 0.5, 0.8, 1, 1.5, 2, 3, 5, 10, 20)
_WAY_SERIES = {"tensor": 1, "context": 2, "data": 3}
_NAMED_SHARE = 1 / 7
_HISTORIES = 12  # lines that can still be told apart


def roofline(rows: Sequence[Row], roofs: Roofs) -> Figure:
    """Arithmetic per second over arithmetic per byte; selection does no arithmetic to speak of and is left out."""
    shown = [row for row in rows if row["ours_us"] and row.get("unit") in ("fp8", "bf16") and row.get("bytes")]
    figure, axes = plt.subplots(figsize=(WIDTH, 3.1))
    intensities = [row["flops"] / row["bytes"] for row in shown] or [100.0]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 2 * roofs.tflops["fp8"] / roofs.bandwidth)
    for unit, role in (("fp8", "ink"), ("bf16", "muted")):
        ridge = roofs.tflops[unit] / roofs.bandwidth
        # Their names lie left of the ridge, where nothing can be.
        axes.plot(
            [low, ridge, high], [low * roofs.bandwidth, roofs.tflops[unit], roofs.tflops[unit]], color=COLOURS[role], lw=1.1
        )
        axes.text(
            low * 1.2, roofs.tflops[unit], f"{unit.upper()} {roofs.tflops[unit]:.0f}", ha="left", va="center", fontsize=7.5
        )
    for number, (stage, found) in enumerate(labels.by_stage(shown).items()):
        role, marker = f"series{number % 6 + 1}", _MARKERS[number % 8]
        _points(axes, found, role, marker, labels.TITLES[stage])
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOPS")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.17), ncols=2, handletextpad=0.2, columnspacing=0.6, fontsize=7.5)
    return figure


def _points(axes: plt.Axes, rows: Sequence[Row], role: str, marker: str, label: str) -> None:
    x = [row["flops"] / row["bytes"] for row in rows]
    axes.plot(x, [row["flops"] / row["ours_us"] / 1e6 for row in rows], marker, color=COLOURS[role], label=label)
    served = [row for row in rows if row["best_peer"]]
    x = [row["flops"] / row["bytes"] for row in served]
    y = [row["flops"] / row["peers"][row["best_peer"]] / 1e6 for row in served]
    axes.plot(x, y, marker, markerfacecolor="none", markeredgecolor=COLOURS[role], markeredgewidth=0.9)


def glance(rows: Sequence[Row]) -> Figure:
    """Every case's ratio, stage by stage: right of the line ours is faster."""
    stages = {stage: ratios for stage, found in labels.by_stage(rows).items() if (ratios := labels.ratios(found))}
    figure, axes = plt.subplots(figsize=(WIDTH, 0.5 + 0.24 * max(len(stages), 1)))
    figure.subplots_adjust(left=0.42, right=0.88, top=1, bottom=0.16)
    for place, ratios in enumerate(stages.values()):
        axes.plot(ratios, [place] * len(ratios), "o", color=COLOURS["ours"], alpha=0.45, markeredgewidth=0)
        mean = statistics.geometric_mean(ratios)
        axes.vlines(mean, place - 0.32, place + 0.32, color=COLOURS["ink"], linewidth=2)
        axes.text(1.02, place, labels.ratio(mean), transform=axes.get_yaxis_transform(), va="center", fontweight="bold")
    every = [1.0, *(ratio for ratios in stages.values() for ratio in ratios)]
    axes.axvline(1.0, color=COLOURS["limit"], linewidth=1.2)
    axes.set(xscale="log", xlim=(min(every) / 1.12, max(every) * 1.12), ylim=(len(stages) - 0.5, -0.5))
    wide = math.log(max(every) / min(every))
    ticks = [1.0]  # and those whose labels fit beside each other
    for tick in sorted(_RATIOS, key=lambda ratio: abs(math.log(ratio))):
        if min(every) / 1.12 <= tick <= max(every) * 1.12 and all(abs(math.log(tick / other)) > wide / 7 for other in ticks):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(stages)), [labels.TITLES[stage] for stage in stages])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time of the best peer over ours")
    return figure


def scaling(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds and gigabytes over the context, and where sparse attention overtakes dense."""
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 4.9), sharex=True)
    for axes, key, scale, name in zip(panels, ("us", "bytes"), (1e3, 1e9), ("ms", "GB, peak"), strict=True):
        for method in METHODS:
            points = [(row["context"], row[key] / scale) for row in rows if row["method"] == method and row[key]]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=COLOURS[_METHOD_ROLES[method]], label=_METHOD_NAMES[method])
                last = {"textcoords": "offset points", "va": "center", "color": COLOURS[_METHOD_ROLES[method]], "fontsize": 7.5}
                axes.annotate(f"{y[-1]:.3g}", (x[-1], y[-1]), xytext=(6, 0), **last)
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
    panels[0].legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=3, handletextpad=0.4, columnspacing=1.0, fontsize=7.5)
    return figure


def ranks(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Speed-up against one GPU: lines are the model's, points were measured; the plain ways are dashed and hollow."""
    steps = (("prefill", 32768, "prefill, 32K"), ("prefill", 131072, "prefill, 128K"), ("decode", 65536, "decode, 64 × 64K"))
    figure, panels = plt.subplots(3, 1, figsize=(WIDTH, 6.6), sharex=True)
    for axes, (stage, context, title) in zip(panels, steps, strict=True):
        axes.plot(model.WORLDS, model.WORLDS, color=COLOURS["grid"], lw=1.1)
        for way in model.WAYS[stage]:
            name, _, plain = way.partition(", ")
            colour = COLOURS[f"series{_WAY_SERIES[name]}"]
            speedups = [model.speedup(stage, way, context, world) for world in model.WORLDS]
            axes.plot(model.WORLDS, speedups, color=colour, lw=1.1, ls=(0, (3, 2)) if plain else "-", label=way)
            points = _measured(rows, f"{stage}_{name}", context, "plain" if plain else "ours")
            axes.plot(*points, "o", color=colour, markerfacecolor="none" if plain else colour)
        axes.set(xscale="log", yscale="log", ylabel=title)
        axes.minorticks_off()
        axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1×", "2×", "4×", "8×", "16×", "32×", "64×"])
        axes.legend(loc="upper left", fontsize=7, handlelength=1.6, labelspacing=0.2)
    panels[-1].set_xticks(model.WORLDS, [str(world) for world in model.WORLDS])
    panels[-1].set_xlabel("GPUs")
    return figure


def _measured(rows: Sequence[Mapping[str, Any]], stage: str, context: int, who: str) -> tuple[list[int], list[float]]:
    """(GPUs, speed-ups) of a way, or of the plain one beside it."""
    found = [row for row in rows if row["stage"] == stage and row["shape"]["context"] == context]
    timed = [(row, {"ours": row["ours_us"], **row["peers"]}.get(who)) for row in found]
    points = [(row["shape"]["ranks"], row["peers"]["one GPU"] / us) for row, us in timed if us]
    return [world for world, _ in points], [ratio for _, ratio in points]


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


def importance(histories: Sequence[Mapping[str, Any]]) -> Figure:
    """A bar for each study, divided among its parameters, the greatest share first; those of a seventh and more are named."""
    shown = histories[:_HISTORIES]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.6 + 0.32 * len(shown)))
    names = list(dict.fromkeys(name for each in shown for name in each["importance"]))
    for row, each in enumerate(shown):
        left = 0.0
        for name, share in each["importance"].items():
            colour = COLOURS[f"series{names.index(name) % 6 + 1}"]
            axes.barh(row, share, left=left, color=colour, edgecolor=COLOURS["paper"], height=0.7)
            if share >= _NAMED_SHARE:
                axes.text(left + share / 2, row, name, ha="center", va="center", fontsize=6.5, color=COLOURS["ink"])
            left += share
    axes.set_yticks(range(len(shown)), [each["name"] for each in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share")
    return figure
