"""Attention of grouped queries over the blocks that a model's own indexer chose, each KV head's own (MiniMax-M3).

The model's code hands those lists to whatever attention function is registered, and makes a mask of the context's size of them
for eager attention alone. So nothing of it is replaced: its indexer, caches and projections stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import functions
from ...errors import InputError, SpecError
from ...ops.attention_gqa import AttentionGqaSpec

CLASSES = ("MiniMaxM3VLAttention",)
"""Attention classes of transformers 5.17 to 5.24 that give their attention function lists of blocks (``block_indices``)."""
_ENTRIES = 1 << 24
"""Of lists of tokens at once: 64 MB."""


def is_grouped(attention: nn.Module) -> bool:
    """Whether an attention module is one of these, or derived from one."""
    return any(each.__name__ in CLASSES for each in type(attention).__mro__)


def check(layer: Any) -> None:
    """Refuse what no kernel serves.

    Raises:
        SpecError: heads, channels or blocks.
    """
    config, indexer = layer.config, layer.indexer
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, layer.head_dim
    if indexer.num_heads != kv_heads:
        raise SpecError("index_n_heads", indexer.num_heads, f"{kv_heads}, a list for each KV head")
    AttentionGqaSpec(heads, kv_heads, width, width, indexer.topk_blocks, indexer.block_size)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, window: Tensor, scaling: float, blocks: Tensor) -> Tensor:
    """[batch, queries, heads, d] of query [batch, heads, queries, d] and the blocks listed for each KV head.

    Args:
        key, value: [batch, kv_heads, tokens, d]; of a static cache all that it has room for.
        window: int32 [batch, 1, queries, 2], the tokens that each query may see.
        blocks: [batch, kv_heads, queries, entries], -1 behind the last.
    """
    if query.is_cuda and query.dtype is not torch.bfloat16:
        raise InputError("model", f"{query.dtype} on a GPU", "torch.bfloat16, which is what kernels multiply")
    batch, _, length, _ = query.shape
    size, k, v = module.indexer.block_size, _rows(key), _rows(value)
    before = torch.arange(batch, dtype=torch.int32, device=key.device) * (key.shape[1] * key.shape[2])
    start, end = (bound.flatten() for bound in window.expand(batch, 1, length, 2).unbind(-1))
    first, lists = before.repeat_interleave(length), blocks.transpose(1, 2).flatten(0, 1).int()
    q, ends = query.transpose(1, 2).flatten(0, 1).contiguous(), (end + first).int()
    if batch == 1 and length > 1 and _see_the_first(start):
        out, _ = functions.sparse_attention_gqa(q, k, v, lists.contiguous(), scaling, block=size, ends=ends)
        return out.unflatten(0, (batch, length))
    # Entries are tokens where a block may begin with padding, or a sequence's rows in the middle of a block.
    step = max(1, _ENTRIES // max(1, lists[0].numel() * size))
    parts = []
    for some in torch.arange(len(q), device=q.device).split(step):
        tokens = _tokens(lists[some], size, start[some], end[some])
        tokens = torch.where(tokens >= 0, tokens + first[some, None, None], -1)
        parts.append(functions.sparse_attention_gqa(q[some], k, v, tokens.int(), scaling)[0])
    return torch.cat(parts).unflatten(0, (batch, length))


def _rows(heads: Tensor) -> Tensor:
    """[batch, kv_heads, tokens, d] as rows [.., kv_heads, d] without a copy: sequence b begins at row b · kv_heads · tokens."""
    heads = heads.contiguous()
    batch, kv_heads, tokens, width = heads.shape
    rows = max(0, batch * kv_heads * tokens - (kv_heads - 1) * tokens)
    return heads.as_strided((rows, kv_heads, width), (width, tokens * width, 1))


def _tokens(blocks: Tensor, size: int, start: Tensor, end: Tensor) -> Tensor:
    """[rows, kv_heads, entries · size]: the tokens of listed blocks within each row's window, -1 in place of the others."""
    token = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(2)
    seen = (blocks >= 0).repeat_interleave(size, 2) & (token >= start[:, None, None]) & (token < end[:, None, None])
    return torch.where(seen, token, -1)


def _see_the_first(start: Tensor) -> bool:
    """Whether no query's window begins behind the first token. It asks the GPU: of a prompt, and of no step."""
    traced = torch.compiler.is_compiling() or (start.is_cuda and torch.cuda.is_current_stream_capturing())
    return not traced and not bool(start.any())
