"""Inverse lists: for each token the entries of the queries' lists that name it, so that their order can be fixed.

Atomics add the queries' shares of a token's gradient in whatever order they arrive. The deterministic backward writes the
shares of a chunk of queries down, and adds them up token by token in the order of these lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import listed

_ROW_BYTES = 1 << 29
"""Of shares that are written down at a time: 113 queries of 2048 tokens and 576 channels."""


def chunk_queries(queries: int, topk: int, d_qk: int) -> int:
    """Queries whose shares are written down at a time."""
    return max(1, min(queries, _ROW_BYTES // (4 * topk * d_qk)))


def inverse_lists(indices: Tensor, tokens: int, d_qk: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort the entries of each chunk of queries by token; ties stay in the order of queries and places.

    Args:
        indices: int32 [queries, 1, topk].
        lengths: int32 [queries], or None.

    Returns:
        (order int32 [chunks, entries]: entries of the chunk, query · topk + place, sorted by token, those that name none last;
        offsets int32 [chunks, tokens + 1]: where each token's entries begin in it).
    """
    queries, _, topk = indices.shape
    rows = chunk_queries(queries, topk, d_qk)
    chunks = -(-queries // rows)
    named = torch.where(listed(indices, tokens, lengths), indices[:, 0], tokens)
    padded = torch.nn.functional.pad(named, (0, 0, 0, chunks * rows - queries), value=tokens).view(chunks, rows * topk)
    ordered, order = padded.sort(dim=1, stable=True)
    edges = torch.arange(tokens + 1, dtype=torch.int32, device=indices.device).expand(chunks, -1).contiguous()
    return order.int(), torch.searchsorted(ordered, edges, out_int32=True)
