"""vLLM's top-k per row: its names, arguments and conventions. Chosen tokens ascend; a tie goes to the lowest token, always."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functions import select


def top_k_per_row_prefill(
    logits: Tensor,
    cu_seqlen_ks: Tensor,
    cu_seqlen_ke: Tensor,
    raw_topk_indices: Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """Write the chosen tokens of each row's window [ks, ke), counted from ks, -1 behind the last.

    Args:
        logits: fp32 or bf16 [num_rows or more, columns].
        cu_seqlen_ks, cu_seqlen_ke: int32 [num_rows].
        raw_topk_indices: int32 [num_rows, topk_tokens], written to.
        stride0, stride1: of the logits, which say so themselves.
    """
    starts, ends, target = cu_seqlen_ks[:num_rows], cu_seqlen_ke[:num_rows], raw_topk_indices[:num_rows, :topk_tokens]
    chosen = select(logits[:num_rows], ends, topk_tokens, starts=starts, out=_contiguous(target))
    chosen.sub_(starts[:, None]).clamp_(min=-1)
    _deliver(chosen, target)


def top_k_per_row_decode(
    logits: Tensor,
    next_n: int,
    seq_lens: Tensor,
    raw_topk_indices: Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """Write the chosen tokens of each row, -1 behind the last.

    Args:
        logits: fp32 or bf16 [num_rows or more, columns], next_n rows for each sequence.
        seq_lens: int32, one for each row, or one for each sequence, whose last query sees all of it.
        The others are as in ``top_k_per_row_prefill``.
    """
    if seq_lens.numel() == num_rows:
        ends = seq_lens.reshape(num_rows)
    else:
        earlier = torch.arange(1 - next_n, 1, dtype=torch.int32, device=seq_lens.device)
        ends = (seq_lens.reshape(-1, 1) + earlier).reshape(-1)[:num_rows]
    target = raw_topk_indices[:num_rows, :topk_tokens]
    _deliver(select(logits[:num_rows], ends, topk_tokens, out=_contiguous(target)), target)


def _contiguous(target: Tensor) -> Tensor | None:
    """The buffer, where kernels can write to it."""
    return target if target.is_contiguous() else None


def _deliver(chosen: Tensor, target: Tensor) -> None:
    if not target.is_contiguous():
        target.copy_(chosen)
