"""Tensor parallelism: instead of scoring all rows on every rank, each scores some, and int32 choices are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import choice
from ..errors import InputError
from ..problem import checks
from .gather import gathered_rows, place
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
        options: score, logits, keep_first, keep_recent, max_bytes of ``index_select``.

    Returns:
        int32 [queries, topk]: tokens, as ``index_select`` gives them.
    """
    rank, world = place(group)
    for name, value in (("q", q), ("k", k), ("weights", weights)):
        checks.check_kind(name, value, "Tensor")
    for name, window in (("starts", starts), ("ends", ends)):
        checks.tensor(name, window, (len(q),), torch.int32, like=q)
    for name in {"page_table", "page", "out", "chosen_scores"} & set(options):
        raise InputError(name, "an argument", "none: choices are gathered as tokens, into memory of their own")
    limits = balanced_bounds(keys_seen(starts, ends, len(k)), world) if bounds is None else list(bounds)
    if len(limits) != world + 1 or limits != sorted(limits) or (limits[0], limits[-1]) != (0, len(q)):
        raise InputError("bounds", limits, f"{world + 1} ascending row numbers from 0 to {len(q)}")
    own = slice(limits[rank], limits[rank + 1])
    windows = starts[own].clone(), ends[own].clone()  # on 16-byte addresses, wherever the rows begin
    chosen = choice.index_select(q[own], k, k_scale, weights[own], *windows, topk, **options)
    return gathered_rows(chosen, limits, group)
