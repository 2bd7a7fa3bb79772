"""Adaptive: the rule of a choice whose size follows the content, as ``index_select`` and ``Layer`` take it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import ops
from .errors import InputError
from .ops.adapt import AdaptSpec
from .ops.select import SelectSpec
from .problem.op import Op
from .problem.presets import Model
from .problem.values import Sizes, Spec
from .runtime.serving import Limits, buckets


@dataclass(frozen=True)
class Adaptive:
    """Each query attends to as many of its topk tokens as its scores are worth; see ``adapt``.

    Args:
        min_score: only tokens whose score is at least so high; a number, or fp32 with one for each query.
        mass: the fewest tokens whose share of the softmaxed scores reaches so much; a number, or fp32 with one for each query.
        mass_of: "window" for a share of all scores of a query's window, "chosen" of its topk highest.
        mass_scale: what scores are multiplied with before the softmax.
        counts: int32, each query's own k.
    """

    min_score: float | Tensor | None = None
    mass: float | Tensor | None = None
    mass_of: str = "window"
    mass_scale: float = 1.0
    counts: Tensor | None = None

    def of_rows(self, rows: slice) -> Adaptive:
        """The rule of some queries, in the order in which numbers of each lie."""
        numbers = {name: getattr(self, name) for name in ("min_score", "mass", "counts")}
        own: dict[str, Any]
        own = {name: each.flatten()[rows] for name, each in numbers.items() if isinstance(each, Tensor)}
        return replace(self, **own)

    def options(self) -> dict[str, Any]:
        """As ``adapt`` takes them."""
        return {name: getattr(self, name) for name in ("min_score", "mass", "mass_of", "mass_scale", "counts")}

    def checked(self, queries: int) -> Adaptive:
        """The rule.

        Raises:
            InputError: numbers of each query are not so many.
        """
        for name in ("min_score", "mass", "counts"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() != queries:
                raise InputError(f"adaptive.{name}", f"{value.numel()} numbers", f"{queries}, one for each query")
        return self


def calls(rule: Adaptive, model: Model, limits: Limits) -> Iterator[tuple[Op, Spec, Sizes]]:
    """What a layer under this rule calls beyond one that is not: tokens in place of slots, the cut, lists with lengths."""
    highest = limits.highest()
    values: dict[str, Any]
    values = {"mass": "none" if rule.mass is None else rule.mass_of, "counts": rule.counts is not None, "chosen_scores": True}
    values |= {"masses": isinstance(rule.mass, Tensor), "min_scores": isinstance(rule.min_score, Tensor)}
    prefill, decode = highest["select-tokens"], highest["select-slots"]
    wanted: list[tuple[str, Spec, Any]] = [("adapt", AdaptSpec(model.topk, **values), prefill)]
    wanted.append(("adapt", AdaptSpec(model.topk, starts=False, output="slots", **values), decode))
    wanted.append(("select", SelectSpec(model.topk, starts=False), decode))
    for name in ("attention", "attention_paged"):
        wanted += [(name, replace(spec, lengths=True), highest[name]) for spec in ops.get(name).specs(model)]
    for name, spec, largest in wanted:
        if 0 not in largest.values():
            yield from ((ops.get(name), spec, sizes) for sizes in buckets(ops.get(name), spec, largest))
