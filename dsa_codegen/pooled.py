"""Choices over pooled keys: blocks of tokens are scored and chosen; their tokens come out, and the tail behind the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import choice, functions
from .errors import InputError
from .problem import checks
from .problem.presets import POOLS


def index_select_pooled(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    block_starts: Tensor,
    starts: Tensor,
    ends: Tensor,
    topk: int,
    pool: int,
    *,
    page_table: Tensor | None = None,
    page: int = 64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The tokens of the topk / pool blocks that each query's indexer scores highest, and those behind its last whole block.

    Args:
        q, weights: as in ``index_select``.
        k, k_scale: pooled keys [blocks, head_dim] of all sequences (``pool_index_k``), and their scales where quantised.
        block_starts: int32 [queries], the first block of the query's sequence.
        starts, ends: int32 [queries], in tokens: the first of the query's sequence, and one past the last that it sees. A block
            counts where the query sees all of it.
        topk: tokens of chosen blocks at most, a multiple of pool; 1 to 4096 blocks.
        pool: tokens of a block.
        page_table, page: as in ``select``, of tokens; with it the result holds slots.
        options: score, logits, max_bytes, scores, sms, batch_invariant, keep_first, keep_recent (blocks) of ``index_select``.

    Returns:
        int32 [queries, topk + pool - 1], ascending, -1 behind the last, and lengths int32 [queries], which ``sparse_attention``
        takes. Ties go to the lowest block.
    """
    blocks = _blocks(topk, pool)
    _refuse(options, "out", "chosen_scores", "adaptive", "chosen_lengths")
    for name, value in (("block_starts", block_starts), ("starts", starts), ("ends", ends)):
        checks.tensor(name, value, (len(q),), torch.int32, like=q)
    whole = (ends - starts.clamp(min=0)).clamp(min=0) // pool
    chosen = choice.index_select(q, k, k_scale, weights, block_starts, block_starts + whole, blocks, **options)
    return functions.expand_blocks(chosen, block_starts, starts, ends, pool, page_table=page_table, page=page)


def index_select_pooled_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_context: int,
    topk: int,
    pool: int,
    *,
    page_table: Tensor | None = None,
    page: int = 64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The same over paged caches, whose pages hold pooled keys. May be captured in a CUDA graph.

    Args:
        q, weights: as in ``index_select_paged``.
        cache: pooled keys, as there; block i of a sequence is place i of its pages.
        lengths: int32 [batch, next_n], tokens that each query sees.
        block_table: int32 [batch, max_pages], the pages of ``cache``.
        max_context: at least the longest length, in tokens.
        topk, pool: as in ``index_select_pooled``.
        page_table, page: int32 [batch, max_pages] of a cache of latents: the result then holds slots, tokens without it.
        options: score, logits, max_bytes, scores, sms, batch_invariant of ``index_select_paged``.

    Returns:
        int32 [batch, next_n, topk + pool - 1] and lengths int32 [batch, next_n].
    """
    blocks = _blocks(topk, pool)
    _refuse(options, "out", "chosen_scores", "adaptive", "chosen_lengths", "slots", "starts")
    batch, next_n = checks.tensor("lengths", lengths, (None, None), torch.int32).shape
    whole = lengths.clamp(min=0) // pool
    given = cache, weights, whole, block_table, max_context // pool, blocks
    chosen = choice.index_select_paged(q, *given, slots=False, **options)
    ends = lengths.flatten()
    none = torch.zeros_like(ends)
    tokens, counts = functions.expand_blocks(chosen.flatten(0, 1), none, none, ends, pool, page_table=page_table, page=page)
    return tokens.view(batch, next_n, -1), counts.view(batch, next_n)


def _refuse(options: dict[str, Any], *names: str) -> None:
    """Options of the choice itself, which is of blocks."""
    for name in names:
        if name in options:
            raise InputError(name, "an argument", "none: choices of blocks are not what is returned")


def _blocks(topk: int, pool: int) -> int:
    """Blocks of a list."""
    for name, value in (("topk", topk), ("pool", pool)):
        checks.check_kind(name, value, "int")
    if pool not in POOLS:
        raise InputError("pool", pool, f"one of {', '.join(map(str, POOLS))}")
    if topk % pool:
        raise InputError("topk", topk, f"a multiple of pool, {pool}")
    return topk // pool
