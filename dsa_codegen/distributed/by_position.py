"""Decode context parallelism: caches sharded by position, each rank scores, selects and attends to what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import choice, functions
from ..errors import InputError
from ..problem import checks
from ..problem.channels import D_V
from ..problem.paged import check_cache
from .candidates import NO_TOKEN, merge_ascending, merge_choices
from .gather import exchanged, gathered, gathered_together, place
from .outputs import merge_attention
from .shard import Shard, checked

DEALT_BYTES = 2 << 20
"""Where so many bytes of candidates would come to every rank, the rows that are merged are dealt out.

Two H200s: an all-gather of 1 MB takes 17.5 µs, half of it exchanged and choices gathered 13.6 and 8.5; every further MB 12."""


def index_select_by_position(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    max_context: int,
    topk: int,
    shard: Shard,
    *,
    group: Any = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    score: str = "weighted_relu",
    logits: str = "fp32",
    max_bytes: int = choice.LOGITS_BYTES,
    sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``index_select_paged`` over a cache of which every rank of a group holds a part; candidates of all are merged.

    One all-gather, or, of many candidates, an exchange of rows and an all-gather of choices (``DEALT_BYTES``). 1 to 128 ranks.

    Args:
        q, weights, lengths: as in ``index_select_paged``, the same on every rank; lengths count the sequence's tokens.
        cache, page_table: the rank's own part; page_table names the pages of the rank's tokens.
        max_context: at least the longest length, of the sequence.
        shard: which tokens the rank holds; those of all ranks make up the sequence.
        group: a process group; torch's default group where absent.
        topk, keep_first, keep_recent, score, logits, max_bytes, sms, batch_invariant: as in ``index_select_paged``.

    Returns:
        int32 [batch, next_n, topk]: tokens of the sequence, ascending, -1 behind the last; the same on every rank.
    """
    place(group)
    batch, next_n = checks.tensor("lengths", lengths, (None, None), torch.int32).shape
    pages = checks.tensor("page_table", page_table, (batch, None), torch.int32, like=lengths, inner_contiguous=True).shape[1]
    head_dim = checks.rows("q", q, (batch, next_n, None, None), checks.FP8, like=lengths).shape[-1]
    page = check_cache("cache", cache, head_dim + 4, like=lengths)
    counts = checked(shard).counted(lengths, pages * page)
    mine = cache, weights, counts, page_table, shard.number(max_context)
    options: dict[str, Any] = {"score": score, "logits": logits, "max_bytes": max_bytes, "sms": sms}
    options["batch_invariant"] = batch_invariant
    candidates = choice.candidates_paged(q, *mine, topk, (shard.offset, shard.stride, shard.block), **options)
    if not (keep_first or keep_recent):
        return _merged(candidates, topk, group).view(batch, next_n, topk)
    tokens, ranked = gathered(candidates, group).permute(2, 1, 0, 3).flatten(2).contiguous()
    kept: dict[str, Any]
    kept = {"ends": lengths.flatten().clamp(max=max_context), "keep_first": keep_first, "keep_recent": keep_recent}
    merged = merge_choices(ranked.view(torch.float32), tokens.masked_fill(tokens == NO_TOKEN, -1), topk, **kept)
    return merged.view(batch, next_n, topk)


def _merged(candidates: Tensor, topk: int, group: Any) -> Tensor:
    """int32 [rows, topk], of the candidates [rows, 2, topk] of every rank; the same on every rank.

    Either all candidates come to every rank, or those of some rows, and then their choices come to all: one message more, but
    bytes and merging that do not grow with the ranks.
    """
    rows, world = len(candidates), place(group)[1]
    if (world - 1) * candidates.numel() * candidates.element_size() < DEALT_BYTES:
        return merge_ascending(gathered(candidates, group), topk)
    share = -(-rows // world)
    if rows < share * world:
        candidates = torch.nn.functional.pad(candidates, (0, 0, 0, 0, 0, share * world - rows), value=NO_TOKEN)
    (come,) = exchanged([candidates.view(world, share, *candidates.shape[1:])], group)
    return gathered(merge_ascending(come, topk), group).flatten(0, 1)[:rows]


def sparse_attention_by_position(
    q: Tensor,
    cache: Tensor,
    chosen: Tensor,
    page_table: Tensor,
    sm_scale: float,
    shard: Shard,
    *,
    page: int = 64,
    group: Any = None,
    sink: Tensor | None = None,
    own_heads: bool = False,
    layout: str | None = None,
    d_v: int = D_V,
    d_rope: int | None = None,
    sms: int | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """``sparse_attention_paged`` over such a cache: each rank attends to its own of the chosen, outputs are merged by lse.

    Args:
        q, sm_scale, sink, layout, d_v, d_rope, sms: as in ``sparse_attention_paged``, the same on every rank.
        cache, page_table: the rank's own part, with its pages of ``page`` tokens.
        chosen: int32 [batch, next_n, topk], tokens of the sequence, from ``index_select_by_position``.
        shard, group: as there.
        own_heads: a rank wants no other heads' results than its own, world-th part of the heads (as where heads are split
            around attention): 1/world of the bytes come, and are merged.
        batch_invariant: as there, for one number of ranks and one shard: each rank's part is a sum of its own.

    Returns:
        out bf16 [batch, next_n, heads, d_v] and lse fp32 [batch, next_n, heads], the same on every rank; with own_heads
        heads / world of them, of each rank its own.
    """
    rank, world = place(group)
    held = checked(shard).offset, shard.stride, shard.block, shard.tokens
    if own_heads and q.shape[-2] % world:
        raise InputError("own_heads", f"{q.shape[-2]} heads", f"a multiple of {world}, the ranks")
    batch, next_n, topk = checks.tensor("chosen", chosen, (None, None, None), torch.int32).shape
    checks.tensor("page_table", page_table, (batch, None), torch.int32, like=chosen, inner_contiguous=True)
    slots, counts = functions.resolve_own(chosen.flatten(0, 1), page_table, page, held)
    own = slots.view(batch, next_n, topk), counts.view(batch, next_n)
    stored: dict[str, Any] = {"layout": layout, "d_v": d_v, "d_rope": d_rope, "batch_invariant": batch_invariant}
    out, lse = functions.sparse_attention_paged(q, cache, own[0], sm_scale, lengths=own[1], sms=sms, **stored)
    if own_heads:
        heads = q.shape[-2] // world
        parts = out.unflatten(2, (world, heads)).movedim(2, 0), lse.unflatten(2, (world, heads)).movedim(2, 0)
        outs, lses = exchanged(parts, group)
        sink = None if sink is None else sink[rank * heads : (rank + 1) * heads].clone()
    else:
        outs, lses = gathered_together([out, lse], group)
    return merge_attention(outs, lses, sink)
