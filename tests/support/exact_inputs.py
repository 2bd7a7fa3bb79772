"""Inputs of the indexers whose scores are sums of few whole eighths: exact in fp32 in any order, and full of ties.

So chunks, splits and ranks give the same bits, which rounding would not.
"""

from __future__ import annotations

import torch

import dsa_codegen as dsa
from dsa_codegen.choice import slots_of
from dsa_codegen.distributed import Shard
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.checks import FP8
from dsa_codegen.problem.draw import Draw

HEADS, HEAD_DIM = 8, 32


def prefill(queries: int, tokens: int, seed: int = 3) -> dict:
    """Arguments of ``indexer_logits``, with windows that start anywhere; one is empty."""
    draw = Draw(seed)
    starts = draw.integers(0, max(tokens // 3, 1), queries)
    ends = (starts + draw.integers(0, tokens, queries)).clamp(max=tokens).int()
    return {
        "q": draw.integers(-2, 3, queries, HEADS, HEAD_DIM).to(FP8),
        "k": draw.integers(-2, 3, tokens, HEAD_DIM).to(FP8),
        "k_scale": 2.0 ** draw.integers(-1, 2, tokens),
        "weights": draw.integers(-4, 8, queries, HEADS) / 4,
        "starts": starts,
        "ends": ends,
    }


def windows(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and ends of as many rows: two causal sequences, one behind the other."""
    row = torch.arange(tokens, dtype=torch.int32)
    return torch.where(row < tokens // 3, 0, tokens // 3).int(), row + 1


def unquantised(queries: int, seed: int = 5) -> dict:
    """Queries in bf16 and weights that ``quantize_index_q`` gives as whole eighths: scales are 1, the folded factor is 1/16."""
    draw = Draw(seed)
    q = draw.integers(-2, 3, queries, HEADS, HEAD_DIM).bfloat16()
    q[..., 0] = 448
    return {"index_q": q, "index_weights": draw.integers(-4, 8, queries, HEADS) * 4.0}


def pages_of(tokens: int, page: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page)


def paged(batch: int, next_n: int, context: int, page: int = 16, seed: int = 4) -> dict:
    """Arguments of ``indexer_logits_paged``, with lengths from 0 to the context."""
    draw = Draw(seed)
    pages = pages_of(context, page)
    blocks = batch * pages + 1
    layout = IndexKLayout(page, HEAD_DIM)
    cache = layout.empty(blocks)
    slots = torch.arange(blocks * page)
    scales = 2.0 ** draw.integers(-1, 2, len(slots))
    layout.pack(cache, slots, draw.integers(-2, 3, len(slots), HEAD_DIM).to(FP8), scales)
    return {
        "q": draw.integers(-2, 3, batch, next_n, HEADS, HEAD_DIM).to(FP8),
        "cache": cache,
        "weights": draw.integers(-4, 8, batch * next_n, HEADS) / 4,
        "lengths": draw.integers(0, context + 1, batch, next_n),
        "page_table": draw.permutation(blocks)[: batch * pages].view(batch, pages).int(),
        "max_context": context,
    }


def part_of(inputs: dict, kv_cache: torch.Tensor, shard: Shard, page: int = 16) -> dict:
    """What a rank holds of the caches of ``paged``: its own tokens, in pages of its own that lie the other way round."""
    batch = len(inputs["page_table"])
    tokens = int(shard.count(torch.tensor(inputs["max_context"])))
    pages = pages_of(tokens, page)
    layout = IndexKLayout(page, HEAD_DIM)
    table = torch.arange(batch * pages).flip(0).view(batch, pages).int()
    cache, kv = layout.empty(batch * pages + 1), kv_cache.new_zeros(batch * pages + 1, *kv_cache.shape[1:])
    own = torch.arange(tokens, dtype=torch.int32).expand(batch, tokens).contiguous()
    source = slots_of(shard.to_global(own), inputs["page_table"], page).flatten()
    target = slots_of(own, table, page).flatten().long()
    layout.pack(cache, target, *dsa.gather_index_k(inputs["cache"], source))
    kv.view(-1, kv.shape[-1])[target] = kv_cache.view(-1, kv.shape[-1])[source.long()]
    return {"cache": cache, "page_table": table, "kv_cache": kv}
