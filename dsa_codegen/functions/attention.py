"""Attention to the tokens of each query's list: of latents that are key and value, or of grouped queries; in rows or pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import invariance
from ..problem import checks
from ..problem.channels import D_V
from . import operators
from .caches import quantize_latents


def sparse_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    max_logits: Tensor | None = None,
    share: int = 1,
    d_v: int = D_V,
    sms: int | None = None,
    batch_invariant: bool = False,
    math: str = "bf16",
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse MLA, prefill: every query attends to its own tokens; one latent vector per token is key and value of all heads.

    Args:
        q: bf16 [queries, heads, d]; heads 1 to 128, d from ``d_v`` to d_v + 128 in steps of 16. On the CPU also fp32, and fp64
            computed in fp64: kv has the dtype of q then, and so has out.
        kv: bf16 [tokens, 1, d]; the first ``d_v`` channels are the value.
        indices: int32 or int64 [queries, 1, topk], invalid ones anywhere. Kernels read int32: int64 is narrowed first, which
            reads and writes them once more (4096 × 2048 of them are 100 MB).
        sm_scale: factor of the scores, usually d^-0.5.
        lengths: int32 [queries]; only so many entries of a row count.
        sink: fp32 [heads], a logit that joins the softmax's denominator; lse stays as it is.
        out, lse: where to write the results, shaped like them and contiguous; new tensors where absent.
        max_logits: fp32 [queries, heads], where to write each head's highest score (-inf where there is none); a kernel of
            its own, so that nobody else pays for it.
        share: 1, 2 or 4: so many neighbouring queries, whose lists hold mostly the same tokens, gather their union together,
            where the heads are few enough (2 up to 16 heads, 4 up to 8; else fewer do). Any lists give right results.
        d_v: 64 to 512 in steps of 16: 512 of DeepSeek-V3.2 (d 576) and V4 (d 512), 128 of A.X-K2 (d 160).
        sms: as in ``indexer_logits``.
        batch_invariant: as there; then none share.
        math: "bf16", or "fp8": queries and tokens in e4m3 with a scale each, weights rounded to e4m3, on GPUs from sm_89 on
            (docs/performance-prefill.md). What comes in bf16 is quantised first; what many calls attend to comes as
            ``quantize_latents`` gives it. No ``max_logits`` then, and none share.
        q_scale: fp32 [queries, heads], positive, where math is "fp8" and q e4m3.
        kv_scale: fp32 [tokens, 1], likewise of kv.

    Returns:
        out bf16 [queries, heads, d_v] and lse fp32 [queries, heads] (natural logarithm). A query without a token gets 0, -inf.
    """
    invariant = batch_invariant or invariance.always()
    if math == "fp8":
        q, q_scale = _as_fp8(q, q_scale)
        kv, kv_scale = _as_fp8(kv, kv_scale)
    if type(indices) is not Tensor or indices.dtype is not torch.int32:  # else a call of ``as_int32`` is spared
        indices = as_int32(indices)
    if out is None and lse is None and max_logits is None:
        return operators.sparse_attention(
            q, kv, indices, sm_scale, lengths, sink, share, invariant, d_v, math, q_scale, kv_scale, sms
        )
    out, lse = _results(q, out, lse, d_v)
    arguments = q, kv, indices, sm_scale, lengths, sink, share, invariant, d_v, math, q_scale, kv_scale
    operators.sparse_attention_into(*arguments, out, lse, max_logits, sms)
    return out, lse


def sparse_attention_paged(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    extra_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_lengths: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    layout: str | None = None,
    d_v: int = D_V,
    d_rope: int | None = None,
    scale: float = 1.0,
    sms: int | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sparse MLA, decode: as ``sparse_attention``, over a paged cache, FP8 or BF16, or over two of them at once.

    A prompt's many rows are read back to BF16 once on Hopper, in up to 1.2 GB of memory (docs/usage.md).

    Args:
        q: bf16 [batch, next_n, heads, d].
        cache: uint8 [blocks, page, 1, 656] ("v3.2") or the planar "v4" pages of 584 bytes a token; page 1 to 1024. Scales lie
            below 2^40, latents hence below 2^48: beyond, results are NaN or infinite, never another number. With ``layout`` a
            cache of that one: bf16 [blocks, page, 1, d], or uint8 rows.
        indices: int32 or int64 [batch, next_n, topk], physical slots (block · page + offset), invalid ones anywhere.
        sm_scale, lengths, sink: as in ``sparse_attention``; lengths is int32 [batch, next_n] or [batch].
        extra_cache, extra_indices, extra_lengths: a second pool, which one softmax attends to together with the first
            (DeepSeek-V4: a window of recent tokens beside the chosen ones): a cache of the same layout with its own page,
            lists of its own length, and lengths of its own where there are any.
        out, lse: as in ``sparse_attention``.
        layout: of the caches; absent, "v32" of 576 channels and "v4" of 512. Others hold any channels: "bf16", and the FP8 rows
            that docs/shapes.md lists ("fp8_fp32_128", "fp8_ue8m0_32", …).
        d_v: as in ``sparse_attention``.
        d_rope: of FP8 rows all of whose channels are value, how many of the last ones are bf16; else d - d_v are.
        scale: of a cache of layout "fp8_tensor", whose values share one.
        sms: as in ``indexer_logits``.
        batch_invariant: as there; a row's entries are then shared out to so many blocks whatever the batch.

    Returns:
        out bf16 [batch, next_n, heads, d_v] and lse fp32 [batch, next_n, heads].
    """
    if type(indices) is not Tensor or indices.dtype is not torch.int32:  # else a call of ``as_int32`` is spared
        indices = as_int32(indices)
    extra = None if extra_indices is None else as_int32(extra_indices)
    fixed, stored, rope = batch_invariant or invariance.always(), layout or "", -1 if d_rope is None else d_rope
    if out is None and lse is None:
        return operators.sparse_attention_paged(
            q, cache, indices, sm_scale, lengths, sink, extra_cache, extra, extra_lengths, fixed, stored, d_v, rope, scale, sms
        )
    out, lse = _results(q, out, lse, d_v)
    pools = q, cache, indices, sm_scale, lengths, sink, extra_cache, extra, extra_lengths
    operators.sparse_attention_paged_into(*pools, fixed, stored, d_v, rope, scale, out, lse, sms)
    return out, lse


def sparse_attention_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    block: int = 1,
    ends: Tensor | None = None,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    share: int = 1,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sparse grouped-query attention: the query heads of a KV head attend to that head's own list of tokens, or of blocks.

    Args:
        q: bf16 [queries, heads, d]; heads 1 to 128, d 16 to 256 in steps of 16 (kernels pad it to a power of two). Query head h
            reads KV head ``h // (heads / kv_heads)``. On the CPU also fp32, and fp64 computed in fp64, as k, v and out then.
        k, v: bf16 [tokens, kv_heads, d] and [tokens, kv_heads, d_v]; kv_heads divides heads, d_v as d. Any strides between
            tokens and between heads, multiples of 8 elements.
        indices: int32 or int64 [queries, kv_heads, topk], invalid ones anywhere; one list for all KV heads is ``expand``-ed.
        sm_scale: factor of the scores, usually d^-0.5.
        block: tokens that an entry stands for, a power of two up to 256: entry b is tokens b · block to (b + 1) · block.
        ends: int32 [queries]; tokens at and beyond it do not count, which is how the block of a query's own token stays causal.
        lengths: int32 [queries, kv_heads]; only so many entries of a list count.
        sink: fp32 [heads], a logit that joins the softmax's denominator; lse stays as it is.
        out, lse: where to write the results, shaped like them and contiguous; new tensors where absent.
        share: 1, 2 or 4: so many neighbouring queries, whose lists hold mostly the same entries, gather their union together,
            where that makes no more than 64 rows of heads and lists have up to 128 entries (else fewer do, or none). Any lists
            give right results.
        batch_invariant: as in ``indexer_logits``; then none share, and a row's tiles are not shared out either.

    Returns:
        out bf16 [queries, heads, d_v] and lse fp32 [queries, heads] (natural logarithm). A query without a token gets 0, -inf.
    """
    invariant = batch_invariant or invariance.always()
    arguments = (q, k, v, as_int32(indices), sm_scale, block, ends, None, lengths, sink, share, invariant)
    if out is None and lse is None:
        return operators.sparse_attention_gqa(*arguments)
    out, lse = _results(q, out, lse, v.shape[-1])
    operators.sparse_attention_gqa_into(*arguments, out, lse)
    return out, lse


def sparse_attention_gqa_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    page_table: Tensor,
    sm_scale: float,
    *,
    block: int = 1,
    ends: Tensor | None = None,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    share: int = 1,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """``sparse_attention_gqa`` of the newest queries of every sequence over paged caches of keys and of values.

    Args:
        q: bf16 [batch, next_n, heads, d].
        k_cache, v_cache: bf16 [blocks, page, kv_heads, d] and [blocks, page, kv_heads, d_v], page 1 to 1024; heads may lie
            outside of a page's tokens (``cache.transpose(1, 2)`` of [blocks, kv_heads, page, d]).
        indices: int32 or int64 [batch, next_n, kv_heads, topk]: tokens, or blocks of tokens, of the sequence, not slots.
        page_table: int32 [batch, max_pages], the block of the caches that holds each page; tokens of a negative one are none.
        sm_scale, block, sink, batch_invariant: as there.
        ends: int32 [batch, next_n], tokens that each query sees.
        lengths: int32 [batch, next_n, kv_heads].
        out, lse: as there, shaped like the results.
        share: as there; queries of one sequence share.

    Returns:
        out bf16 [batch, next_n, heads, d_v] and lse fp32 [batch, next_n, heads].
    """
    checks.rows("q", q, (None, None, None, None), checks.floating(q))
    checks.rows("indices", indices, (*q.shape[:2], None, None), (torch.int32, torch.int64), like=q, whole=False)
    ends = None if ends is None else checks.tensor("ends", ends, q.shape[:2], torch.int32, like=q).flatten()
    if lengths is not None:
        lengths = checks.tensor("lengths", lengths, (*q.shape[:2], None), torch.int32, like=q).flatten(0, 1)
    listed, invariant = as_int32(indices).flatten(0, 1), batch_invariant or invariance.always()
    cached = q.flatten(0, 1), k_cache, v_cache, listed, sm_scale, block, ends, page_table
    arguments = (*cached, lengths, sink, share, invariant)
    if out is None and lse is None:
        flat = operators.sparse_attention_gqa_paged(*arguments)
        return flat[0].unflatten(0, q.shape[:2]), flat[1].unflatten(0, q.shape[:2])
    out, lse = _results(q, out, lse, v_cache.shape[-1])
    checks.tensor("out", out, (*q.shape[:3], v_cache.shape[-1]), q.dtype, like=q)
    checks.tensor("lse", lse, q.shape[:3], torch.float32, like=q)
    operators.sparse_attention_gqa_paged_into(*arguments, out.flatten(0, 1), lse.flatten(0, 1))
    return out, lse


def as_int32(indices: Tensor) -> Tensor:
    """The indices as int32. What int32 cannot hold is no token, and stays none at its ends."""
    narrow = getattr(indices, "dtype", None) is torch.int64
    return indices.clamp(-1, 2**31 - 1).int() if narrow else indices


def _as_fp8(rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows in e4m3 and their scales: quantised where they came in bf16, and without scales."""
    wide = getattr(rows, "dtype", None) is torch.bfloat16 and rows.dim() == 3 and scale is None
    return quantize_latents(rows) if wide else (rows, scale)


def _results(q: Tensor, out: Tensor | None, lse: Tensor | None, d_v: int = D_V) -> tuple[Tensor, Tensor]:
    """Buffers for what the caller brought none for; the operator checks those that came."""
    rows = q.shape[:-1]
    dtype = torch.bfloat16 if q.dtype is checks.FP8 else q.dtype
    out = q.new_empty(*rows, d_v, dtype=dtype) if out is None else out
    return out, q.new_empty(rows, dtype=torch.float32) if lse is None else lse
