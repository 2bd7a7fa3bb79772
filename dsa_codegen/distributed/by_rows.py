"""Tensor parallelism: instead of scoring all rows on every rank, each scores some, and int32 choices are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import choice
from ..errors import InputError
from ..problem import checks
from .gather import counts_of, gathered_rows, place
from .rows import balanced_bounds, keys_seen


def index_select_by_rows(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    topk: int,
    *,
    group: Any = None,
    bounds: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """``index_select`` with its rows dealt out to the ranks of a group; every rank passes, and gets, all of them.

    Args:
        q, k, k_scale, weights, starts, ends, topk: as in ``index_select``, the same on every rank.
        group: a process group; torch's default group where absent.
        bounds: as ``balanced_bounds`` gives them, the same on every rank. Where absent they are made of the windows, which
            waits for those that lie on a GPU.
        options: score, logits, keep_first, keep_recent, max_bytes, sms, batch_invariant of ``index_select``.

    Returns:
        int32 [queries, topk]: tokens, as ``index_select`` gives them.
    """
    rank, world = place(group)
    for name, value in (("q", q), ("k", k), ("weights", weights)):
        checks.check_kind(name, value, "Tensor")
    for name, window in (("starts", starts), ("ends", ends)):
        checks.tensor(name, window, (len(q),), torch.int32, like=q)
    for name in {"page_table", "page", "out", "chosen_scores", "adaptive", "chosen_lengths"} & set(options):
        raise InputError(name, "an argument", "none: choices are gathered as tokens, into memory of their own")
    limits = balanced_bounds(keys_seen(starts, ends, len(k)), world) if bounds is None else list(bounds)
    own = _own(limits, rank, world, len(q))
    windows = starts[own].clone(), ends[own].clone()  # on 16-byte addresses, wherever the rows begin
    chosen = choice.index_select(q[own], k, k_scale, weights[own], *windows, topk, **options)
    return gathered_rows(chosen, counts_of(limits), group)


def index_select_paged_by_rows(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    max_context: int,
    topk: int,
    *,
    group: Any = None,
    bounds: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """``index_select_paged`` with its sequences dealt out to the ranks of a group; every rank passes, and gets, all of them.

    Nothing waits for the GPU, so that it may be captured in a CUDA graph where the group's collectives may.

    Args:
        q, cache, weights, lengths, page_table, max_context, topk: as in ``index_select_paged``, the same on every rank.
        group: a process group; torch's default group where absent.
        bounds: world + 1 ascending numbers of sequences, from 0 to batch, the same on every rank: ``balanced_bounds`` of
            lengths that are known on the host. Where absent ranks have equally many sequences.
        options: starts, score, logits, slots, keep_first, keep_recent, max_bytes, sms, batch_invariant of
            ``index_select_paged``.

    Returns:
        int32 [batch, next_n, topk], as ``index_select_paged`` gives them.
    """
    rank, world = place(group)
    batch, next_n = checks.tensor("lengths", lengths, (None, None), torch.int32).shape
    for name, value, rows in (("q", q, batch), ("weights", weights, batch * next_n), ("page_table", page_table, batch)):
        checks.check_kind(name, value, "Tensor")
        if len(value) != rows:
            raise InputError(name, f"{len(value)} rows", f"{rows}, by {batch} sequences of lengths")
    for name in {"out", "chosen_scores", "adaptive", "chosen_lengths"} & set(options):
        raise InputError(name, "an argument", "none: choices are gathered into memory of their own")
    limits = [batch * each // world for each in range(world + 1)] if bounds is None else list(bounds)
    own = _own(limits, rank, world, batch)
    if options.get("starts") is not None:
        options["starts"] = _aligned(options["starts"][own])
    own_rows = slice(own.start * next_n, own.stop * next_n)
    mine = _aligned(weights[own_rows]), _aligned(lengths[own]), _aligned(page_table[own])
    chosen = choice.index_select_paged(q[own], cache, *mine, max_context, topk, **options)
    return gathered_rows(chosen, counts_of(limits), group)


def _own(limits: list[int], rank: int, world: int, rows: int) -> slice:
    if len(limits) != world + 1 or limits != sorted(limits) or (limits[0], limits[-1]) != (0, rows):
        raise InputError("bounds", limits, f"{world + 1} ascending row numbers from 0 to {rows}")
    return slice(limits[rank], limits[rank + 1])


def _aligned(part: Tensor) -> Tensor:
    """The part, on a 16-byte address wherever its rows begin."""
    return part.clone() if part.data_ptr() % 16 else part
