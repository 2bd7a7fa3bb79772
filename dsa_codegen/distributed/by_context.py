"""Context parallelism, prefill: each rank has some rows of the step; keys are gathered first, latents while it scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import choice, functions
from ..problem import checks
from ..problem.channels import D_V
from .deal import Deal
from .gather import gather_rows


def prefill_by_context(
    q: Tensor,
    kv: Tensor,
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    index_k_scale: Tensor,
    starts: Tensor,
    ends: Tensor,
    topk: int,
    sm_scale: float,
    deal: Deal,
    *,
    group: Any = None,
    sink: Tensor | None = None,
    d_v: int = D_V,
    sms: int | None = None,
    batch_invariant: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, select, attend for the rank's rows of a step whose rows are dealt out.

    Selection needs all scores of a row, so keys and latents of all rows come to every rank; the latents (1152 bytes a token,
    keys are 132) travel while the rank scores and selects. Sequences and windows are free: rows are those of the whole step.

    Args:
        q, index_q, index_weights, starts, ends: the rank's rows, as in ``sparse_attention`` and ``index_select``; windows count
            in tokens of the whole step.
        kv, index_k, index_k_scale: the same rows' latents and keys.
        topk, sm_scale, sink, d_v: as there.
        deal: which rows each rank has, the same on every rank.
        group: a process group; torch's default group where absent.
        sms: what scoring and selection are given while the latents travel; all where absent.
        batch_invariant: of all stages, as in ``indexer_logits``; every row's bits are then those of one rank alone.
        options: score, logits, keep_first, keep_recent, max_bytes of ``index_select``.

    Returns:
        out bf16 [rows, heads, d_v], lse fp32 [rows, heads] and chosen int32 [rows, topk], tokens of the whole step.

    Raises:
        InputError: before any collective, where this rank's arguments do not fit together or the deal.
    """
    kv = checks.tensor("kv", kv, (None, 1, None), torch.bfloat16, like=q)
    for name, value in (("index_k", index_k), ("index_k_scale", index_k_scale), ("q", q), ("index_q", index_q)):
        checks.tensor(name, value, (len(kv), *([None] * (value.dim() - 1))), value.dtype, like=kv, inner_contiguous=True)
    keys = gather_rows([index_k, index_k_scale], deal, group)
    latents = gather_rows([kv], deal, group)
    k, k_scale = keys.wait()
    chosen = choice.index_select(
        index_q, k, k_scale, index_weights, starts, ends, topk, sms=sms, batch_invariant=batch_invariant, **options
    )
    last: dict[str, Any] = {"sink": sink, "d_v": d_v, "batch_invariant": batch_invariant}
    out, lse = functions.sparse_attention(q, latents.wait()[0], chosen[:, None], sm_scale, **last)
    return out, lse, chosen
