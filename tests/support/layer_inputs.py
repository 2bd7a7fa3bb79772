"""Inputs of a layer's steps, shared by the tests of the layer, of its warmup and of its capture in a fresh process."""

from __future__ import annotations

import torch

import dsa_codegen as dsa
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.presets import Model

TINY = dsa.preset("tiny")
V4 = Model("v4", heads=8, d_nope=448, d_rope=64, index_heads=8, index_head_dim=32, topk=64, kv_layout="v4", attn_sink=True)
LATENT = {"d_nope": 128, "d_rope": 32, "d_v": 128}
NARROW = Model("narrow", 4, **LATENT, index_heads=6, index_head_dim=48, topk=64, kv_layout="bf16", keep_first=3, keep_recent=9)
"""A latent of 128 channels in BF16 pages, an indexer whose heads and channels are padded, tokens that are always chosen."""


def prefill_inputs(model: Model, queries: int, tokens: int, device: str = "cpu"):
    draw = Draw(11, device)
    d = model.d_nope + model.d_rope
    keys = draw.normal(tokens, model.index_head_dim, dtype=torch.bfloat16)
    index_k, index_k_scale = dsa.quantize_index_k(keys)
    ends = torch.arange(tokens - queries + 1, tokens + 1, dtype=torch.int32, device=device)
    return {
        "q": draw.normal(queries, model.heads, d, dtype=torch.bfloat16, scale=10.0),
        "kv": draw.normal(tokens, 1, d, dtype=torch.bfloat16, scale=0.1),
        "index_q": draw.normal(queries, model.index_heads, model.index_head_dim, dtype=torch.bfloat16),
        "index_weights": draw.normal(queries, model.index_heads),
        "index_k": index_k,
        "index_k_scale": index_k_scale,
        "starts": torch.zeros_like(ends),
        "ends": ends,
        "sink": draw.normal(model.heads) if model.attn_sink else None,
    }


def decode_inputs(model: Model, batch: int, next_n: int, context: int, device: str = "cpu"):
    draw = Draw(12, device)
    pages = -(-context // model.page)
    blocks = batch * pages + 1
    kv, index = model.cache, IndexKLayout(model.page, model.index_head_dim)
    kv_cache, index_cache = kv.empty(blocks, device=device), index.empty(blocks, device=device)
    slots = torch.arange(blocks * model.page, dtype=torch.int32, device=device)
    tokens = len(slots)
    nope = draw.normal(tokens, model.d_nope, dtype=torch.bfloat16, scale=0.1)
    dsa.store_kv(
        nope, draw.normal(tokens, model.d_rope, dtype=torch.bfloat16, scale=0.1), slots, kv_cache, layout=model.kv_layout
    )
    dsa.store_index_k(draw.normal(tokens, model.index_head_dim, dtype=torch.bfloat16), slots, index_cache)
    lengths = draw.integers(1, context + 1, batch, 1).expand(batch, next_n).contiguous()
    d = model.d_nope + model.d_rope
    return {
        "q": draw.normal(batch, next_n, model.heads, d, dtype=torch.bfloat16, scale=10.0),
        "kv_cache": kv_cache,
        "index_q": draw.normal(batch, next_n, model.index_heads, model.index_head_dim, dtype=torch.bfloat16),
        "index_weights": draw.normal(batch, next_n, model.index_heads),
        "index_cache": index_cache,
        "lengths": lengths,
        "page_table": draw.permutation(blocks)[: batch * pages].view(batch, pages).int(),
        "max_context": context,
        "sink": draw.normal(model.heads) if model.attn_sink else None,
    }
