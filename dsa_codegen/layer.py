"""Layer: the three stages of DeepSeek Sparse Attention in a row, for prefill and for decode over paged caches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, functions
from .needs import needs
from .presets import Model

LOGITS_BYTES = 1 << 30


class Attended(NamedTuple):
    """What a layer returns."""

    out: Tensor
    lse: Tensor
    chosen: Tensor
    """The tokens (prefill) or physical slots (decode) that each query attended to, -1 where fewer than topk."""


class Layer:
    """Indexer, selection and sparse attention of one model.

    Args:
        model: a ``Model``: ``preset("glm-5")``, ``load("my-model.yaml")``.
        logits_bytes: prefill holds at most so many bytes of logits at once; longer contexts are done in chunks of queries.
    """

    def __init__(self, model: Model, logits_bytes: int = LOGITS_BYTES) -> None:
        self.model = model
        self.sm_scale = (model.d_nope + model.d_rope) ** -0.5
        self._logits_bytes = logits_bytes

    def prefill(
        self,
        q: Tensor,
        kv: Tensor,
        index_q: Tensor,
        index_weights: Tensor,
        index_k: Tensor,
        index_k_scale: Tensor,
        starts: Tensor,
        ends: Tensor,
        sink: Tensor | None = None,
    ) -> Attended:
        """Attend from every query to the topk tokens that its indexer scores highest.

        Args:
            q: bf16 [queries, heads, d_nope + d_rope].
            kv: bf16 [tokens, 1, d_nope + d_rope].
            index_q: bf16 [queries, index_heads, index_head_dim].
            index_weights: fp32 or bf16 [queries, index_heads], not scaled.
            index_k, index_k_scale: e4m3 [tokens, index_head_dim] and fp32 [tokens], from ``quantize_index_k``.
            starts, ends: int32 [queries], each query's window.
            sink: fp32 [heads], where the model has sinks.

        Returns:
            out bf16 [queries, heads, 512], lse fp32 [queries, heads], chosen int32 [queries, topk].
        """
        index_q, index_weights = functions.quantize_index_q(index_q, index_weights)
        parts = []
        step = max(4, self._logits_bytes // max(4 * len(index_k), 1) // 4 * 4)  # every chunk begins 16-byte aligned
        for first in range(0, max(len(q), 1), step):
            rows = slice(first, first + step)
            windows = starts[rows].contiguous(), ends[rows].contiguous()
            logits = functions.indexer_logits(
                index_q[rows], index_k, index_k_scale, index_weights[rows], *windows, score=self.model.score
            )
            parts.append(functions.select(logits, windows[1], self.model.topk, starts=windows[0]))
            del logits  # before the next chunk's are allocated
        chosen = parts[0] if len(parts) == 1 else torch.cat(parts)
        out, lse = functions.sparse_attention(q, kv, chosen[:, None], self.sm_scale, sink=sink)
        return Attended(out, lse, chosen)

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        index_q: Tensor,
        index_weights: Tensor,
        index_cache: Tensor,
        lengths: Tensor,
        page_table: Tensor,
        max_context: int,
        sink: Tensor | None = None,
    ) -> Attended:
        """Attend from the newest queries of every sequence to the topk tokens of its paged caches. Safe in a CUDA graph.

        Args:
            q: bf16 [batch, next_n, heads, d_nope + d_rope].
            kv_cache, index_cache: the paged caches, which share a page table and page size.
            index_q: bf16 [batch, next_n, index_heads, index_head_dim].
            index_weights: fp32 or bf16 [batch, next_n, index_heads], not scaled.
            lengths: int32 [batch, next_n], tokens that each query sees.
            page_table: int32 [batch, max_pages].
            max_context: at least the longest length; fixed while a graph is in use.

        Returns:
            out bf16 [batch, next_n, heads, 512], lse fp32 [batch, next_n, heads], chosen int32 [batch, next_n, topk] (slots).
        """
        batch, next_n = index_q.shape[:2]
        flat_q, flat_weights = functions.quantize_index_q(index_q.flatten(0, 1), index_weights.flatten(0, 1))
        logits = functions.indexer_logits_paged(
            flat_q.view(index_q.shape), index_cache, flat_weights, lengths, page_table, max_context, score=self.model.score
        )
        chosen = functions.select(logits, lengths.flatten(), self.model.topk, page_table=page_table, page=self.model.page).view(
            batch, next_n, -1
        )
        out, lse = functions.sparse_attention_paged(q, kv_cache, chosen, self.sm_scale, sink=sink)
        return Attended(out, lse, chosen)

    def warmup(self, processes: int | None = None) -> int:
        """Build and load every kernel that the layer calls at the sizes people serve; returns how many were new."""
        return dispatch.warmup(((need.op, need.spec, need.case.sizes) for need in needs(self.model)), processes)
