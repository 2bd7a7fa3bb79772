"""How the ranks of a group share a layer's work, what ``Layer(model, parallel=…)`` takes; modes call the wing's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .. import choice, functions, ops
from ..errors import InputError
from ..ops.attention_paged import AttentionPagedSpec
from ..ops.select import SelectSpec
from ..problem.op import Op
from ..problem.presets import NO_CACHE, Model
from ..problem.values import Sizes, Spec
from ..runtime.serving import Limits, buckets
from .by_context import prefill_by_context
from .by_position import index_select_by_position, sparse_attention_by_position
from .by_rows import index_select_by_rows, index_select_paged_by_rows
from .deal import Deal
from .gather import gathered_rows, place
from .shard import Shard


class PrefillStep(NamedTuple):
    """A layer's checked arguments, with quantised queries of the indexer; names as in ``Layer.prefill``."""

    q: Tensor
    kv: Tensor
    index_q: Tensor
    index_weights: Tensor
    index_k: Tensor
    index_k_scale: Tensor
    starts: Tensor
    ends: Tensor
    topk: int
    sm_scale: float
    sink: Tensor | None
    options: dict[str, Any]
    """Of ``index_select``."""
    stored: dict[str, Any]
    """Of ``sparse_attention``: which channels are the value."""

    @property
    def scored(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """What ``index_select`` takes."""
        return (self.index_q, self.index_k, self.index_k_scale, self.index_weights, self.starts, self.ends, self.topk)


class DecodeStep(NamedTuple):
    """The same of ``Layer.decode``."""

    q: Tensor
    kv_cache: Tensor
    index_q: Tensor
    index_weights: Tensor
    index_cache: Tensor
    lengths: Tensor
    page_table: Tensor
    max_context: int
    topk: int
    sm_scale: float
    page: int
    sink: Tensor | None
    options: dict[str, Any]
    """Of ``index_select_paged``."""
    stored: dict[str, Any]
    """Of ``sparse_attention_paged``: channels and layout of the cache."""

    @property
    def scored(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
        """What ``index_select_paged`` takes."""
        rows = self.index_q, self.index_cache, self.index_weights, self.lengths, self.page_table
        return (*rows, self.max_context, self.topk)


Results = tuple[Tensor, Tensor, Tensor]
"""out, lse, chosen."""


@dataclass(frozen=True)
class Alone:
    """One rank does everything."""

    def prefill(self, step: PrefillStep) -> Results:
        """The stages one after another."""
        return self._attend(step, self.choose(*step.scored, **step.options))

    def decode(self, step: DecodeStep) -> Results:
        """The stages one after another."""
        options: dict[str, Any] = {"sink": step.sink, "batch_invariant": step.options["batch_invariant"], **step.stored}
        options["lengths"] = step.options.get("chosen_lengths")
        chosen = self.choose_paged(*step.scored, page=step.page, **step.options)
        attended = self.attend_paged(step.q, step.kv_cache, chosen, step.page_table, step.sm_scale, page=step.page, **options)
        return (*attended, chosen)

    def choose(self, *scored: Any, **options: Any) -> Tensor:
        """``index_select`` of the step's rows."""
        return choice.index_select(*scored, **options)

    def choose_paged(self, *scored: Any, page: int, **options: Any) -> Tensor:
        """``index_select_paged`` of the step's sequences."""
        return choice.index_select_paged(*scored, **options)

    def attend_paged(
        self, q: Tensor, kv_cache: Tensor, chosen: Tensor, page_table: Tensor, sm_scale: float, *, page: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """``sparse_attention_paged`` to what ``choose_paged`` chose."""
        return functions.sparse_attention_paged(q, kv_cache, chosen, sm_scale, **options)

    def further(self, model: Model, limits: Limits) -> Iterator[tuple[Op, Spec, Sizes]]:
        """Calls, for a layer's warmup, beyond those of a layer that is alone."""
        return iter(())

    def _attend(self, step: PrefillStep, chosen: Tensor) -> Results:
        options: dict[str, Any] = {"sink": step.sink, "batch_invariant": step.options["batch_invariant"], **step.stored}
        options["lengths"] = step.options.get("chosen_lengths")
        return (*functions.sparse_attention(step.q, step.kv, chosen[:, None], step.sm_scale, **options), chosen)


@dataclass(frozen=True)
class TensorParallel(Alone):
    """Heads of attention are split, caches are on every rank; the indexer's rows (decode: sequences) are dealt out.

    The layer's model is the rank's, with its heads; ``q`` and ``sink`` are the rank's, all else is the same on every rank.

    Args:
        group: a process group; torch's default group where absent.
        bounds: as in ``index_select_by_rows`` (prefill) and ``index_select_paged_by_rows`` (decode), for steps of one size.
        least: decode steps of fewer keys (sequences times ``max_context``) are scored by every rank, where there are no bounds:
            on two H200s an all-gather takes 12 µs, and half of 700000 keys as long.
    """

    group: Any = None
    bounds: Sequence[int] | None = None
    least: int = 1 << 19

    def choose(self, *scored: Any, bounds: Sequence[int] | None = None, **options: Any) -> Tensor:
        """Choices of all rows, of which each rank scores some: as ``bounds`` says, or else the mode's."""
        return index_select_by_rows(*scored, group=self.group, bounds=bounds or self.bounds, **options)

    def choose_paged(self, *scored: Any, page: int, **options: Any) -> Tensor:
        """Choices of all sequences, of which each rank scores some, or all where that is little."""
        lengths, max_context = scored[3], scored[5]
        if self.bounds is None and len(lengths) * max_context < self.least:
            return super().choose_paged(*scored, page=page, **options)
        return index_select_paged_by_rows(*scored, group=self.group, bounds=self.bounds, **options)


@dataclass(frozen=True)
class ContextParallel(Alone):
    """Prefill: rows of the step are dealt out, every argument but ``sink`` is of the rank's rows. Decode: caches are sharded.

    In decode ``chosen`` are tokens of the sequence, the same on every rank, as are out and lse (of all heads, or of the rank's
    own); caches and page table are the rank's, all else is the same on every rank.

    Args:
        deal: which rows a rank has: a ``Deal``, or "zigzag" or "interleaved" where all ranks have equally many.
        shard: which tokens the rank's caches hold; dealt out page by page where absent.
        group: a process group; torch's default group where absent.
        sms: of scoring, while latents travel.
        own_heads: decode gives each rank its part of the heads only.
    """

    deal: Deal | str = "zigzag"
    shard: Shard | None = None
    group: Any = None
    sms: int | None = None
    own_heads: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.deal, Deal) and self.deal not in ("zigzag", "interleaved"):
            raise InputError("deal", repr(self.deal), 'a Deal, "zigzag" or "interleaved"')

    def prefill(self, step: PrefillStep) -> Results:
        """The rank's rows; windows count in tokens of the whole step."""
        arguments: dict[str, Any] = {"group": self.group, "sink": step.sink, "sms": self.sms, **step.stored, **step.options}
        first = step.q, step.kv, step.index_q, step.index_weights, step.index_k, step.index_k_scale
        return prefill_by_context(
            *first, step.starts, step.ends, step.topk, step.sm_scale, self._deal(len(step.q)), **arguments
        )

    def choose_paged(self, *scored: Any, page: int, **options: Any) -> Tensor:
        """Tokens of each sequence, the same on every rank, from the candidates of all parts."""
        choose: Callable[..., Tensor] = index_select_by_position
        return choose(*scored, self.held(page), group=self.group, **options)

    def attend_paged(
        self, q: Tensor, kv_cache: Tensor, chosen: Tensor, page_table: Tensor, sm_scale: float, *, page: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """All sequences, over the rank's part of each."""
        options.pop("lengths", None)  # of lists that an adaptive rule shortened, which this mode does not have
        options |= {"page": page, "group": self.group, "own_heads": self.own_heads}
        return sparse_attention_by_position(q, kv_cache, chosen, page_table, sm_scale, self.held(page), **options)

    def held(self, page: int) -> Shard:
        """Which tokens the rank's caches hold."""
        return self.shard or Shard.interleaved(*place(self.group), page)

    def further(self, model: Model, limits: Limits) -> Iterator[tuple[Op, Spec, Sizes]]:
        """See ``beyond``."""
        return self.beyond(model, limits, place(self.group)[1])

    def beyond(self, model: Model, limits: Limits, ranks: int) -> Iterator[tuple[Op, Spec, Sizes]]:
        """Decode selects tokens, then among the candidates of all ranks, attends to counted lists without sinks, and merges."""
        if model.kv_layout == NO_CACHE:
            return
        highest, select, attention = limits.highest(), ops.get("select"), ops.get("attention_paged")
        rows = highest["select-slots"]
        candidates = {"rows": rows["rows"], "columns": ranks * model.topk}
        wanted: list[tuple[Op, Spec, Mapping[str, int | None]]] = [
            (select, SelectSpec(model.topk, starts=False), rows),
            (select, SelectSpec(model.topk, starts=False, output="slots", page=1), candidates),
        ]
        for spec in attention.specs(model):
            counted = AttentionPagedSpec.from_dict({**spec.to_dict(), "lengths": True, "sink": False})
            wanted.append((attention, counted, highest["attention_paged"]))
        heads = None if rows["rows"] is None else rows["rows"] * model.heads
        for name, number in (("candidates", rows["rows"]), ("merge_lists", rows["rows"]), ("merge_parts", heads)):
            wanted += [(ops.get(name), spec, {"rows": number}) for spec in ops.get(name).specs(model)]
        for op, spec, largest in wanted:
            if 0 not in largest.values():
                yield from ((op, spec, sizes) for sizes in buckets(op, spec, largest))

    def _deal(self, rows: int) -> Deal:
        if isinstance(self.deal, Deal):
            return self.deal
        world = place(self.group)[1]
        return _equal(self.deal, rows * world, world)


_EQUAL: dict[tuple[str, int, int], Deal] = {}
_MOST_DEALS = 64


def _equal(kind: str, tokens: int, world: int) -> Deal:
    """A deal that earlier steps of this size made: its index tensors are on the GPU."""
    key = kind, tokens, world
    if key not in _EQUAL:
        if len(_EQUAL) >= _MOST_DEALS:
            _EQUAL.clear()
        _EQUAL[key] = Deal.zigzag(tokens, world) if kind == "zigzag" else Deal.interleaved(tokens, world)
    return _EQUAL[key]


@dataclass(frozen=True)
class DataParallel(Alone):
    """Every rank has sequences of its own, none perhaps, and all heads: no rank needs another's to attend.

    Args:
        counts: rows (prefill) or sequences (decode) of each rank, where every rank wants the results of all, one rank's behind
            the other's; no collective is called where absent. The layer's call then returns all ranks' rows.
        group: a process group; torch's default group where absent.
    """

    counts: Sequence[int] | None = None
    group: Any = None

    def prefill(self, step: PrefillStep) -> Results:
        """The rank's own rows, or those of all ranks."""
        out, lse, chosen = map(self.everyones, super().prefill(step))
        return out, lse, chosen

    def decode(self, step: DecodeStep) -> Results:
        """The rank's own sequences, or those of all ranks."""
        out, lse, chosen = map(self.everyones, super().decode(step))
        return out, lse, chosen

    def everyones(self, own: Tensor) -> Tensor:
        """The rank's rows, or those of all ranks where they are wanted."""
        if self.counts is None:
            return own
        rank, world = place(self.group)
        if len(self.counts) != world or self.counts[rank] != len(own):
            raise InputError("counts", list(self.counts), f"{world} numbers, {len(own)} for rank {rank}")
        return gathered_rows(own, self.counts, self.group)
