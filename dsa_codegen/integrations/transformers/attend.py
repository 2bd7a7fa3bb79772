"""Attention over the latents that the cache holds, in the form of transformers' attention functions.

``kv_b_proj`` would expand every latent of the context to keys and values of all heads. Half of it is absorbed into the queries
instead, the other half applied to the outputs (DeepSeek-V2 report, section 2.1.2): a query then reads topk latents and no more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import functions
from ...errors import InputError
from ...problem.channels import D_V
from . import grouped

_D_ROPE = 64
_ROWS = 4096
"""Queries at a time: those of 128 heads in the latent space, 600 MB, and as many outputs."""


def latents(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for ``expand_kv``: the latents as they are, [batch, 1, tokens, kv_lora_rank] and [batch, 1, tokens, rotary]."""
    return kv_nope, k_rot


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    indices: Tensor | None = None,
    s_aux: Tensor | None = None,
    block_indices: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend from query [batch, heads, queries, nope + rotary] to the latents at ``indices`` [batch, queries, topk].

    Args:
        key, value: what ``latents`` gave; of a module that is not enabled (a layer with a sliding window, say) its keys and
            values, which torch's attention takes.
        attention_mask: the windows int32 [batch, 1, queries, 2].
        s_aux: sinks [heads].
        block_indices: [batch, kv_heads, queries, entries], the blocks that a model of grouped queries chose (``grouped``).

    Returns:
        [batch, queries, heads, v_head_dim], and no weights.
    """
    if dropout:
        raise InputError("attention_dropout", dropout, "0, as kernels drop nothing")
    if block_indices is not None:
        return grouped.attend(module, query, key, value, attention_mask, scaling, block_indices), None
    lesson: Any = getattr(module, "dsa_lesson", None)
    sink = None if s_aux is None else s_aux.float()
    if lesson is not None and lesson.applies:
        return lesson.attend(module, query, key, value, attention_mask, scaling, indices, sink), None
    if query.is_cuda and query.dtype is not torch.bfloat16:
        raise InputError("model", f"{query.dtype} on a GPU", "torch.bfloat16, which is what kernels multiply")
    dense_below = getattr(module, "dsa_dense_below", None)
    if dense_below is None:
        return _dense(query, key, value, attention_mask, scaling), None
    length, tokens = query.shape[2], key.shape[2]
    if tokens <= dense_below and 2 * length >= tokens and s_aux is None:
        # Every window is whole, and expanding costs no more than the queries do.
        key, value = type(module).expand_kv(module, key, value)
        return _dense(query, key, value, attention_mask, scaling), None
    assert indices is not None
    kv, chosen = _rows(key, value, indices)
    down, up = halves(module, query.shape[1])
    step = max(1, _ROWS // len(query))
    parts = [
        _attend(query[:, :, first : first + step], kv, chosen[:, first : first + step], down, up, scaling, sink)
        for first in range(0, length, step)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def _attend(query: Tensor, kv: Tensor, chosen: Tensor, down: Tensor, up: Tensor, scaling: float, sink: Tensor | None) -> Tensor:
    """Some queries of every sequence: into the latent space, attend, and out of it."""
    batch, heads, length, _ = query.shape
    rank, latent = down.shape[-1], absorbed(query, down).flatten(0, 1)
    out, _ = functions.sparse_attention(latent, kv, chosen.flatten(0, 1)[:, None].contiguous(), scaling, sink=sink)
    return torch.einsum("bqhl,hvl->bqhv", out.view(batch, length, heads, -1)[..., :rank], up)


def absorbed(query: Tensor, down: Tensor) -> Tensor:
    """Queries [batch, heads, queries, nope + rotary] in the latent space, [batch, queries, heads, 576]."""
    nope = down.shape[1]
    plain = torch.einsum("bhqn,hnl->bqhl", query[..., :nope], down)
    return torch.cat([*_widened(plain, D_V), *_widened(query[..., nope:].transpose(1, 2), _D_ROPE)], dim=-1)


def halves(module: Any, heads: int) -> tuple[Tensor, Tensor]:
    """``kv_b_proj``'s two parts: [heads, nope, latent], absorbed into queries, and [heads, v, latent], applied to outputs."""
    weight: Tensor = module.kv_b_proj.weight.unflatten(0, (heads, -1))
    down, up = weight.split([module.qk_nope_head_dim, module.v_head_dim], dim=1)
    return down, up


def whole_rows(key: Tensor, value: Tensor) -> Tensor:
    """Latents [batch, 1, tokens, 576] of what ``latents`` gave."""
    return torch.cat([*_widened(key, D_V), *_widened(value, _D_ROPE)], dim=-1)


def _widened(channels: Tensor, width: int) -> list[Tensor]:
    """The pieces of so many channels: narrower latents lie between zeros, which add nothing to a product; none stays none."""
    missing = width - channels.shape[-1]
    if not channels.shape[-1]:
        return []
    return [channels] if not missing else [channels, channels.new_zeros(*channels.shape[:-1], missing)]


def _rows(key: Tensor, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(latents [rows, 1, channels], row numbers like ``indices``), sequences one behind the other.

    Where the chosen are fewer than the context, as in decoding, only they are copied together; the kernel reads rows once more.
    """
    batch, length, topk = indices.shape
    tokens, absent = key.shape[2], indices < 0
    numbers = torch.arange(batch, dtype=torch.int32, device=key.device)[:, None, None]
    if length * topk < tokens:
        place = indices.clamp(min=0).long().view(batch, 1, -1, 1)
        key, value = (each.gather(2, place.expand(-1, -1, -1, each.shape[-1])) for each in (key, value))
        own = torch.arange(length * topk, dtype=torch.int32, device=key.device).view(1, length, topk)
        chosen = own + numbers * (length * topk)
    else:
        chosen = indices + numbers * tokens
    return whole_rows(key, value).flatten(0, 2)[:, None], torch.where(absent, -1, chosen)


def _dense(query: Tensor, key: Tensor, value: Tensor, window: Tensor, scaling: float) -> Tensor:
    """torch's attention over expanded keys and values, within the windows; 0 where a window is empty, as at padding."""
    token = torch.arange(key.shape[2], device=key.device)
    seen = (token >= window[..., :1]) & (token < window[..., 1:])
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0).transpose(1, 2)
