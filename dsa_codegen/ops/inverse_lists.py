"""Inverse lists: for each token the entries of the queries' lists that name it, so that their order can be fixed.

Atomics add the queries' shares of a token's gradient in whatever order they arrive. The deterministic backward writes the
shares of a chunk of queries down, and adds them up token by token in the order of these lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import checks

_ROW_BYTES = 1 << 29
"""Of shares that are written down at a time: 113 queries of 2048 tokens and 576 channels."""


def listed(indices: Tensor, tokens: int, lengths: Tensor | None = None) -> Tensor:
    """bool [queries, topk]: which entries of the lists name a token."""
    chosen = indices[:, 0]
    valid = (chosen >= 0) & (chosen < tokens)
    if lengths is None:
        return valid
    return valid & (torch.arange(chosen.shape[1], device=chosen.device) < lengths[:, None])


def chunk_queries(queries: int, topk: int, channels: int) -> int:
    """Queries whose shares are written down at a time."""
    return max(1, min(queries, _ROW_BYTES // (4 * topk * channels)))


def inverse_lists(indices: Tensor, tokens: int, channels: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort the entries of each chunk of queries by token; ties stay in the order of queries and places.

    Args:
        indices: int32 [queries, 1, topk].
        channels: of a token, whose gradients in fp32 are written down.
        lengths: int32 [queries], or None.

    Returns:
        (order int32 [chunks, entries]: entries of the chunk, query · topk + place, sorted by token, those that name none last;
        offsets int32 [chunks, tokens + 1]: where each token's entries begin in it).
    """
    queries, _, topk = indices.shape
    rows = chunk_queries(queries, topk, channels)
    chunks = -(-queries // rows)
    named = torch.where(listed(indices, tokens, lengths), indices[:, 0], tokens)
    padded = torch.nn.functional.pad(named, (0, 0, 0, chunks * rows - queries), value=tokens).view(chunks, rows * topk)
    ordered, order = padded.sort(dim=1, stable=True)
    edges = torch.arange(tokens + 1, dtype=torch.int32, device=indices.device).expand(chunks, -1).contiguous()
    return order.int(), torch.searchsorted(ordered, edges, out_int32=True)


def check_lists(order: Tensor | None, offsets: Tensor | None, q: Tensor, topk: int, tokens: int) -> None:
    """Raise InputError unless there are none, or they can be ``inverse_lists`` of the queries ``q``, some in each chunk."""
    if order is None and offsets is None:
        return
    if order is None or offsets is None:
        raise InputError("offsets", "one of order and offsets alone", "both, from inverse_lists, or none")
    checks.tensor("order", order, (None, None), torch.int32, like=q)
    chunks, entries = order.shape
    if entries % topk or chunks * entries < q.shape[0] * topk:
        raise InputError("order", f"shape {list(order.shape)}", f"chunks of whole lists of {topk}, {q.shape[0]} lists in all")
    checks.tensor("offsets", offsets, (chunks, tokens + 1), torch.int32, like=q)
