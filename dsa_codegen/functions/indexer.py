"""The indexer: a score for every token of a query's window, over rows of keys or over pages of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .. import invariance
from ..errors import InputError
from ..ops.indexer import OP as INDEXER
from ..ops.logits import chunk_rows, row_bytes
from ..problem import checks
from . import operators


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
        batch_invariant: see the package's first lines.

    Windows are clamped to the tokens first: a start below 0 is 0.

    Returns:
        [queries, tokens], or [queries, max_window]; rows are padded to 128 elements.
    """
    invariant = batch_invariant or invariance.always()
    return operators.indexer_logits(
        q, k, k_scale, weights, starts, ends, score, logits, clean, max_window, scores, invariant, sms
    )


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
    INDEXER.bind(q, k, k_scale, weights, starts, ends, score, logits, clean, max_window, scores, False)
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
    invariant = batch_invariant or invariance.always()
    return operators.indexer_logits_paged(
        q, cache, weights, lengths, page_table, max_context, score, logits, clean, scores, invariant, sms
    )


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
    return operators.pool_index_k(k, gates, bias, first)
