"""The operations as functions: what a model calls. CUDA tensors run tuned kernels, CPU tensors the reference.

Every function raises InputError, naming the argument, before anything is launched, or SpecError, naming the field, where a
size or option is one that no kernel serves (65 heads of the indexer, topk 5000). "No token" is -1 or any index at or beyond
the number of tokens, anywhere in a row. All may be captured in a CUDA graph once they have run (or ``warmup`` was called) for
the sizes in question, and all but ``indexer_logits_chunks``, which is a
loop of the host around one of them, are traced by ``torch.compile``. Surroundings change nothing: neither the default dtype nor
autocast. There is no backward: an input that requires a gradient, where gradients are on, is an InputError on every device.
Queries, keys, latents, weights, lists and caches may be parts of wider rows, strided in all but the last dimension.
NaN stays where it is: a NaN key or scale gives NaN scores of its token, which ``select`` takes only where nothing else is left;
a NaN in a chosen token, or in a query, gives NaN in the rows of ``out`` and ``lse`` that it takes part in; a query without a
token gives 0 and -inf, whatever it holds.

Five functions take ``sms``: the SMs that the call's grid is made for, all of the GPU's where it is None. Kernels whose blocks
stay until all is done then leave the other SMs to whatever runs beside them (a collective on another stream); kernels with a
block for each piece of work only share it out for so many. It changes no result but the rounding of sums that are split
otherwise.

Functions whose results hold rounded sums take ``batch_invariant``: whether a row's results have the same bits whatever other
rows, chunks, splits, ranks and records there are. Kernels are excluded that add up in another order than their spec's one; it
costs what docs/performance.md says. ``select``, quantising, storing and gathering are so in any case: nothing they sum is
rounded. ``use_batch_invariant`` and DSA_BATCH_INVARIANT=1 say it for all calls of a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import invariance, ops
from .errors import InputError
from .ops.logits import chunk_rows, row_bytes
from .problem import checks
from .problem.channels import D_V
from .problem.kv_layouts import KV_LAYOUTS
from .problem.paged import D_ROPE
from .runtime.torch_ops import direct

_indexer_logits = direct("indexer_logits")
_indexer_logits_paged = direct("indexer_logits_paged")
_select = direct("select")
_select_into = direct("select_into")
_sparse_attention = direct("sparse_attention")
_sparse_attention_into = direct("sparse_attention_into")
_sparse_attention_paged = direct("sparse_attention_paged")
_sparse_attention_paged_into = direct("sparse_attention_paged_into")
_sparse_attention_gqa = direct("sparse_attention_gqa")
_sparse_attention_gqa_into = direct("sparse_attention_gqa_into")
_sparse_attention_gqa_paged = direct("sparse_attention_gqa", k="k_cache", v="v_cache")
_sparse_attention_gqa_paged_into = direct("sparse_attention_gqa_into", k="k_cache", v="v_cache")
_quantize_q = direct("quantize", source="q")
_quantize_k = direct("quantize", source="k")
_quantize_latents = direct("quantize", source="latents")
_store_k = direct("quantize_paged", source="k")
_store_kv = direct("quantize_paged", source="nope")
_gather_paged = direct("gather_paged")
_index_prologue = direct("index_prologue")
_store_latent = direct("store_latent")
_resolve = direct("resolve")
_adapt = direct("adapt")
_expand_blocks = direct("expand_blocks")
_pool_index_k = direct("pool_index_k")


def indexer_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    score: str = "weighted_relu",
    logits: str = "fp32",
    clean: bool = False,
    max_window: int | None = None,
    scores: str = "fp8",
    sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Lightning indexer, prefill: ``Σ_j w[t,j] · ReLU(q[t,j] · k[s] · k_scale[s])`` for the tokens s of query t's window.

    Args:
        q: e4m3 [queries, heads, head_dim]; heads 1 to 64, head_dim 32 to 256 in steps of 16 (docs/shapes.md: what is padded).
        k: e4m3 [tokens, head_dim].
        k_scale: fp32 [tokens]; None where nothing is quantised.
        weights: fp32 [queries, heads], with the scale of q, head_dim^-0.5 and heads^-0.5 folded in (``quantize_index_q``).
        starts, ends: int32 [queries], the window [start, end) of each query: causal, ragged batches, context parallelism.
        score: "weighted_relu", or "relu_bias" for ``Σ_j ReLU(q[t,j] · k[s] + w[t,j])``.
        logits: "fp32" or "bf16".
        clean: write -inf outside the windows; otherwise those columns keep whatever was in memory.
        max_window: compressed rows of so many columns: column j of a row is token ``start + j`` of its window. Tokens of a
            window beyond them are not scored; columns beyond a window count as outside of it.
        scores: "fp8" as above, or "bf16" for queries and keys that nobody quantised: q and k bf16 (on the CPU also fp32, and
            fp64 computed in fp64), no ``k_scale``.
        sms: as many SMs as the call's grid is made for; all where absent.
        batch_invariant: see the module's first lines.

    Windows are clamped to the tokens first: a start below 0 is 0.

    Returns:
        [queries, tokens], or [queries, max_window]; rows are padded to 128 elements.
    """
    windows, invariant = (starts, ends), batch_invariant or invariance.always()
    return _indexer_logits(q, k, k_scale, weights, *windows, score, logits, clean, max_window, scores, invariant, sms=sms)


def indexer_logits_chunks(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    max_bytes: int = 1 << 30,
    score: str = "weighted_relu",
    logits: str = "fp32",
    clean: bool = False,
    max_window: int | None = None,
    scores: str = "fp8",
    sms: int | None = None,
    batch_invariant: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """``indexer_logits`` in chunks of rows, in order, so that any context can be scored in bounded memory.

    The same call gives the same bits. A chunk is a call of its own: its rows differ from those of a whole call by the rounding
    of fp32 sums in another order (1e-5 of the largest score, measured on the CPU), where other rows make another kernel serve;
    with ``batch_invariant`` they have the same bits.

    Every chunk is memory of its own, which stays as it is for as long as it is kept. A loop still holds one chunk while the
    next is computed: the budget covers these two.

    Args:
        max_bytes: the budget of bytes of logits: one chunk where all rows fit, else chunks of at most half of it, at least 4
            rows each.
        The others are as in ``indexer_logits``.

    Returns:
        An iterator of (first row, logits [rows of the chunk, tokens or max_window]); none without queries.

    Raises:
        InputError: at once, before the first chunk is asked for; also where the budget does not hold 8 rows.
    """
    if not isinstance(max_bytes, int):
        raise InputError("max_bytes", repr(max_bytes), "a whole number")
    checks.check_kind("clean", clean, "bool")
    checks.check_kind("max_window", max_window, "Optional[int]")
    ops.get("indexer").bind(q, k, k_scale, weights, starts, ends, score, logits, clean, max_window, scores, False)
    queries, columns = len(q), len(k) if max_window is None else max_window
    step = chunk_rows(max_bytes, queries, columns, logits)
    if step < queries:
        step = chunk_rows(max_bytes // 2, queries, columns, logits)
    if not step and queries:
        rows = min(queries, 8)
        raise InputError("max_bytes", max_bytes, f"at least {rows * row_bytes(columns, logits)}, {rows} rows of logits")

    options: dict[str, Any] = {"score": score, "logits": logits, "scores": scores, "batch_invariant": batch_invariant}

    def chunk(rows: slice) -> Tensor:
        parts = q[rows], k, k_scale, weights[rows], starts[rows], ends[rows]
        return indexer_logits(*parts, **options, clean=clean, max_window=max_window, sms=sms)

    return ((first, chunk(slice(first, first + step))) for first in range(0, queries, max(step, 1)))


def indexer_logits_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    max_context: int,
    *,
    score: str = "weighted_relu",
    logits: str = "fp32",
    clean: bool = False,
    scores: str = "fp8",
    sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Lightning indexer, decode: the newest queries of every sequence against its paged key cache.

    Args:
        q: e4m3 [batch, next_n, heads, head_dim].
        cache: uint8 [blocks, page, 1, head_dim + 4], planar inside a page: the keys of the page, then its fp32 scales.
        weights: fp32 [batch · next_n, heads].
        lengths: int32 [batch, next_n], tokens that each query sees.
        page_table: int32 [batch, max_pages], the block of each page.
        max_context: columns of the result; at least the longest length.
        score, logits, clean, sms, batch_invariant: as in ``indexer_logits``.
        scores: "fp8" as above, or "bf16": q and cache unquantised, the cache [blocks, page, 1, head_dim] of q's dtype, bf16
            (on the CPU also fp32 and fp64).

    Returns:
        [batch · next_n, max_context].
    """
    cached, invariant = (cache, weights, lengths, page_table, max_context), batch_invariant or invariance.always()
    return _indexer_logits_paged(q, *cached, score, logits, clean, scores, invariant, sms=sms)


def select(
    scores: Tensor,
    ends: Tensor,
    topk: int,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
    page: int = 64,
    keep_first: int = 0,
    keep_recent: int = 0,
    out: Tensor | None = None,
    sms: int | None = None,
) -> Tensor:
    """The k highest scores of each row's window [start, end), in ascending order of tokens; ties go to the lowest token.

    Args:
        scores: fp32 or bf16 [rows, columns], at most 2^30 columns; rows may be strided.
        ends: int32 [rows].
        topk: 1 to 4096.
        starts: int32 [rows]; 0 where absent.
        page_table: int32 [requests, max_pages]; with it the result holds physical slots (block · page + offset), and
            rows / requests consecutive rows share a request.
        keep_first, keep_recent: so many tokens at the window's start and end are always chosen; they count among the k.
        out: int32 [rows, topk], contiguous, where to write the result; a new tensor where absent.
        sms: as in ``indexer_logits``.

    Returns:
        int32 [rows, topk], -1 behind the last chosen token of a short window. The same input gives the same bits, always.
    """
    arguments = (scores, ends, topk, starts, page_table, page, keep_first, keep_recent)
    if out is None:
        return _select(*arguments, sms=sms)
    _select_into(*arguments, out, sms=sms)
    return out


def adapt(
    scores: Tensor,
    chosen: Tensor,
    ends: Tensor,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
    page: int = 64,
    keep_first: int = 0,
    keep_recent: int = 0,
    min_score: float | Tensor | None = None,
    mass: float | Tensor | None = None,
    mass_of: str = "window",
    mass_scale: float = 1.0,
    counts: Tensor | None = None,
    chosen_scores: bool = False,
) -> tuple[Tensor, ...]:
    """Of each row's choice as many tokens as its scores are worth: the longest beginning of the order that all rules allow.

    The order is that of choice: what is kept, then the highest score first, ties to the lowest token, NaN last.

    Args:
        scores: fp32 or bf16 [rows, columns], what ``chosen`` was chosen from.
        chosen: int32 [rows, topk], tokens as ``select`` gives them, not slots.
        ends, starts, keep_first, keep_recent: as in ``select``; what is kept there is kept here.
        page_table, page: as in ``select``; with a table the result holds slots.
        min_score: only tokens whose score is at least so high; for all rows, or fp32 [rows].
        mass: the fewest tokens whose share of ``Σ exp(mass_scale · score)`` reaches so much, more than 0 and at most 1; for all
            rows, or fp32 [rows].
        mass_of: "window" for a share of all scores of the row's window, "chosen" of those in ``chosen`` alone, which reads
            nothing else.
        counts: int32 [rows], each row's own k.
        chosen_scores: also return the scores of what is taken.

    Returns:
        tokens or slots int32 [rows, topk] in ascending order of tokens, -1 behind the last, and lengths int32 [rows], how many
        they are, which ``sparse_attention`` takes; then fp32 [rows, topk], -inf behind the last, where scores are asked for. A
        weight below 2^-32 of the highest counts as none; so do those of -inf and NaN.
    """
    minimum, share = ((None, each) if isinstance(each, Tensor) else (each, None) for each in (min_score, mass))
    windows = ends, starts, page_table, page, keep_first, keep_recent
    return tuple(_adapt(scores, chosen, *windows, *minimum, *share, mass_of, mass_scale, counts, chosen_scores))


def expand_blocks(
    chosen: Tensor,
    block_starts: Tensor,
    starts: Tensor,
    ends: Tensor,
    pool: int,
    *,
    page_table: Tensor | None = None,
    page: int = 64,
) -> tuple[Tensor, Tensor]:
    """The tokens of chosen blocks, and the tail: the row's tokens behind its last whole block, of which it chose none.

    Args:
        chosen: int32 [rows, n], blocks that ``select`` chose, ascending, -1 behind the last.
        block_starts: int32 [rows], the first block of the row's sequence.
        starts: int32 [rows], the first token of the sequence: that of block ``block_starts``.
        ends: int32 [rows], one past the last token that the row sees.
        pool: tokens of a block, a power of two up to 64.
        page_table: int32 [requests, max_pages], of tokens counted from 0; with it the result holds slots.

    Returns:
        int32 [rows, n · pool + pool - 1], ascending, -1 behind the last, and lengths int32 [rows].
    """
    out, lengths = _expand_blocks(chosen, block_starts, starts, ends, pool, page_table, page)
    return out, lengths


def pool_index_k(k: Tensor, gates: Tensor, bias: Tensor, first: Tensor) -> Tensor:
    """One key of the indexer for each block of tokens: ``Σ_i softmax_i(gates + bias) · k``, channel by channel.

    Args:
        k: bf16 [tokens, head_dim], normalised, with position where the model has one; rows may be strided.
        gates: fp32 or bf16 [tokens, head_dim]; zeros for a plain mean.
        bias: fp32 [pool, head_dim], by place in the block; pool is a power of two up to 64.
        first: int32 [blocks], the first token of each block; a block that is not wholly among the tokens is zero.

    Returns:
        bf16 [blocks, head_dim], for ``quantize_index_k``, ``store_index_k``, or as it is.
    """
    return _pool_index_k(k, gates, bias, first)


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
            (docs/performance.md: speed and error). What comes in bf16 is quantised first; what many calls attend to comes as
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
    arguments = (q, kv, _as_int32(indices), sm_scale, lengths, sink, share, invariant, d_v, math, q_scale, kv_scale)
    if out is None and lse is None and max_logits is None:
        return _sparse_attention(*arguments, sms=sms)
    out, lse = _results(q, out, lse, d_v)
    _sparse_attention_into(*arguments, out, lse, max_logits, sms=sms)
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
    listed = None if extra_indices is None else _as_int32(extra_indices)
    extra, invariant = (extra_cache, listed, extra_lengths), batch_invariant or invariance.always()
    arguments = (q, cache, _as_int32(indices), sm_scale, lengths, sink, *extra, invariant)
    stored = layout or "", d_v, -1 if d_rope is None else d_rope, scale
    if out is None and lse is None:
        return _sparse_attention_paged(*arguments, *stored, sms=sms)
    out, lse = _results(q, out, lse, d_v)
    _sparse_attention_paged_into(*arguments, *stored, out, lse, sms=sms)
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
    arguments = (q, k, v, _as_int32(indices), sm_scale, block, ends, None, lengths, sink, share, invariant)
    if out is None and lse is None:
        return _sparse_attention_gqa(*arguments)
    out, lse = _results(q, out, lse, v.shape[-1])
    _sparse_attention_gqa_into(*arguments, out, lse)
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
    listed, invariant = _as_int32(indices).flatten(0, 1), batch_invariant or invariance.always()
    cached = q.flatten(0, 1), k_cache, v_cache, listed, sm_scale, block, ends, page_table
    arguments = (*cached, lengths, sink, share, invariant)
    if out is None and lse is None:
        flat = _sparse_attention_gqa_paged(*arguments)
        return flat[0].unflatten(0, q.shape[:2]), flat[1].unflatten(0, q.shape[:2])
    out, lse = _results(q, out, lse, v_cache.shape[-1])
    checks.tensor("out", out, (*q.shape[:3], v_cache.shape[-1]), q.dtype, like=q)
    checks.tensor("lse", lse, q.shape[:3], torch.float32, like=q)
    _sparse_attention_gqa_paged_into(*arguments, out.flatten(0, 1), lse.flatten(0, 1))
    return out, lse


def _as_int32(indices: Tensor) -> Tensor:
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


def quantize_index_q(q: Tensor, weights: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Queries of the indexer to e4m3, their scales folded into the weights.

    Args:
        q: bf16 [queries, heads, head_dim].
        weights: fp32 or bf16 [queries, heads].
        power_of_two: round scales up to a power of two (ue8m0).

    Returns:
        e4m3 [queries, heads, head_dim] and fp32 [queries, heads]: ``weights · scale · head_dim^-0.5 · heads^-0.5``.
    """
    if weights is None:  # the operator takes that for keys
        raise InputError("weights", "None", "a tensor")
    return _quantize_q(q, weights, power_of_two)


def quantize_index_k(k: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Keys of the indexer, bf16 [tokens, head_dim], to e4m3 [tokens, head_dim] and one fp32 scale per token.

    A row with a NaN is NaN, values and scale; so it is wherever rows are quantised. One with an infinity is so once it is
    multiplied out.
    """
    return _quantize_k(k, None, power_of_two)


def quantize_latents(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Queries or tokens of ``sparse_attention``, bf16 [rows, heads or 1, d], to e4m3, and fp32 scales [rows, heads or 1].

    A scale is the largest magnitude over 448, at least 1e-4 / 448.
    """
    if not isinstance(latents, Tensor) or latents.dim() != 3:
        came = f"shape {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError("latents", came, "a tensor [rows, heads or 1, d]")
    values, scales = _quantize_latents(latents.flatten(0, 1), None, False)
    return values.view(latents.shape), scales.view(latents.shape[:2])


def store_index_k(k: Tensor, slots: Tensor, cache: Tensor, *, power_of_two: bool = False) -> None:
    """Quantise keys of the indexer, bf16 [tokens, head_dim], into their slots [tokens] of a paged cache.

    A slot is block · page + offset; one outside the cache (-1) is skipped. Of rows with the same slot the last is stored,
    whole. More than 1024 rows take 4 bytes of scratch memory for every slot of the cache.
    """
    _store_k(k, None, slots, cache, "index_k", power_of_two, 1.0)


def store_kv(
    nope: Tensor,
    rope: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    *,
    layout: str = "v32",
    power_of_two: bool = False,
    scale: float = 1.0,
) -> None:
    """Quantise latent vectors into their slots [tokens] of a paged KV cache; slots as in ``store_index_k``.

    Args:
        nope: bf16 [tokens, 512] ("v32") or [tokens, 448] ("v4"), quantised in groups of 128 or 64 channels; of other layouts 16
            to 512 channels in steps of their groups, or of 16.
        rope: bf16 [tokens, 64], stored as it is; of other layouts 0 to 128 channels in steps of 16, None for none.
        layout: "v32" (656 bytes a token), "v4" (584), "bf16" (nothing is quantised), or one of docs/shapes.md ("fp8_ue8m0_64");
            those with ue8m0 scales, "v4" too, have power-of-two scales only.
        scale: of a cache of layout "fp8_tensor", whose values share one: what lies beyond 448 of it becomes 448 of it.
    """
    checks.one_of("layout", layout, KV_LAYOUTS)
    _store_kv(nope, rope, slots, cache, layout, power_of_two, scale)


def gather_index_k(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the indexer at ``slots`` [tokens]: e4m3 [tokens, head_dim] and fp32 scales; zeros at invalid slots."""
    keys, scales = _gather_paged(cache, slots, "index_k", D_ROPE, 1.0)
    return keys, scales


def gather_kv(cache: Tensor, slots: Tensor, *, layout: str = "v32", d_rope: int = D_ROPE, scale: float = 1.0) -> Tensor:
    """Latent vectors at ``slots`` [tokens], dequantised: bf16 [tokens, 576] ("v32"), [tokens, 512] ("v4"), …

    Invalid slots give zeros.

    Args:
        layout, scale: as in ``store_kv``.
        d_rope: channels that stay bf16, of FP8 rows; their others follow from the bytes of a token.
    """
    checks.one_of("layout", layout, KV_LAYOUTS)
    (latent,) = _gather_paged(cache, slots, layout, d_rope, scale)
    return latent


def index_prologue(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    *,
    eps: float = 1e-6,
    rotary: str = "half_split",
    rope_first: bool = True,
    hadamard: bool = False,
    power_of_two: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """What lies between the indexer's projections and its scores, in one launch: LayerNorm of k, rotary position, an optional
    Hadamard rotation, FP8, q's scales folded into the weights, k stored into its cache.

    Args:
        q: bf16 [tokens, heads, head_dim]; tokens may be strided. No heads store keys alone, for a step that scores nothing.
        weights: fp32 or bf16 [tokens, heads], not scaled; rows may be strided.
        k: bf16 [tokens, head_dim]; rows may be strided.
        norm_weight, norm_bias: fp32 or bf16 [head_dim], the LayerNorm of k; both None for keys that come normalised.
        cos_sin: fp32 [positions, d_rope], d_rope / 2 cosines and as many sines of each position; d_rope 16 to 128 in steps of
            16, at most head_dim. None, with positions, where no channel is rotary.
        positions: int64 [tokens]; a token whose position the table does not have is NaN.
        slots: int32 or int64 [tokens], where k is stored; as in ``store_index_k``.
        cache: uint8 [blocks, page, 1, head_dim + 4].
        eps: added to the variance of the norm.
        rotary: "half_split" (channel i is paired with i + d_rope / 2; DeepSeek-V3.2) or "interleaved" (2i with 2i + 1; GLM-5).
        rope_first: whether the rotary channels are the first ones of a row, or the last.
        hadamard: multiply q and k by the Hadamard matrix / sqrt(head_dim) before they are quantised; head_dim a power of two.
        power_of_two: round scales up to a power of two (ue8m0).
        batch_invariant: see the module's first lines.

    Returns:
        q as e4m3 [tokens, heads, head_dim] and fp32 [tokens, heads]: ``weights · scale · head_dim^-0.5 · heads^-0.5``.
    """
    placed = cos_sin, positions, slots, cache
    options = eps, rotary, rope_first, hadamard, power_of_two, batch_invariant or invariance.always()
    return _index_prologue(q, weights, k, norm_weight, norm_bias, *placed, *options)


def store_latent(
    latent: Tensor,
    norm_weight: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    *,
    eps: float = 1e-6,
    layout: str = "v32",
    rotary: str = "interleaved",
    power_of_two: bool = False,
    batch_invariant: bool = False,
    scale: float = 1.0,
) -> None:
    """RMSNorm of latent vectors, rotary position of their last channels, and their slots of a paged KV cache, in one launch.

    Args:
        latent: bf16 [tokens, 576] ("v32"), [tokens, 512] ("v4") or what another layout holds, as the down projection gives it.
        norm_weight: fp32 or bf16, of the channels without position (512 or 448) or of all of them; None for no norm.
        cos_sin, positions, eps, rotary: as in ``index_prologue``; d_rope is 64 in "v32" and "v4".
        slots: int32 or int64 [tokens]; as in ``store_index_k``.
        cache: of the layout, as in ``store_kv``.
        layout, power_of_two, scale: as in ``store_kv``.
        batch_invariant: see the module's first lines.
    """
    checks.one_of("layout", layout, KV_LAYOUTS)
    placed = cos_sin, positions, slots, cache
    options = eps, layout, rotary, power_of_two, batch_invariant or invariance.always(), scale
    _store_latent(latent, norm_weight, *placed, *options)


def resolve(chosen: Tensor, page_table: Tensor, *, page: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look chosen tokens up in a cache that holds some of a sequence's: where they are, and which must be fetched.

    For KV caches in the host's memory with a buffer of hot rows on the GPU: ``slots`` and ``counts`` are what
    ``sparse_attention_paged`` takes as ``indices`` and ``lengths``, ``misses`` are what a loader copies. Deterministic: both
    lists keep the order of the choice. Rows of one request may miss the same token, each for itself.

    Args:
        chosen: int32 [rows, topk], tokens of the sequence, -1 anywhere for none; topk 1 to 8192.
        page_table: int32 [requests, pages]: the block of the buffer that holds each page of tokens, negative where none does; a
            token beyond the table is missing. rows / requests consecutive rows share a request.
        page: tokens per page, 1 to 1024; with 1 the table states a row of the buffer for each token.

    Returns:
        slots int32 [rows, topk], block · page + offset, -1 behind the last, and counts int32 [rows];
        misses int32 [rows, topk], the tokens, -1 behind the last, and missed int32 [rows], how many they are.
    """
    slots, counts, misses, missed = _resolve(chosen, page_table, page, True, 0, 1, 1, 2**31 - 1)
    return slots, counts, misses, missed


def resolve_own(chosen: Tensor, page_table: Tensor, page: int, held: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """``resolve`` of the tokens that a shard holds, without a list of others: slots and counts.

    Args:
        held: offset, stride, block and tokens of ``distributed.Shard``; page_table names the shard's own pages.
    """
    slots, counts = _resolve(chosen, page_table, page, False, *held)
    return slots, counts
