"""SGLang's top-k: its names, arguments and conventions. Chosen tokens ascend; a tie goes to the lowest token, always.

Row b's window is ``[row_starts[b], row_starts[b] + lengths[b])``; indices count from its start, and -1 stands behind the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functions import select


def fast_topk_v2(score: Tensor, lengths: Tensor, topk: int, row_starts: Tensor | None = None) -> Tensor:
    """The chosen tokens of each row's window, counted from the window's start.

    Args:
        score: fp32 or bf16 [rows, columns].
        lengths: int32 [rows].
        topk: 1 to 4096.
        row_starts: int32 [rows]; 0 where absent.

    Returns:
        int32 [rows, topk].
    """
    if row_starts is None:
        return select(score, lengths, topk)
    chosen = select(score, row_starts + lengths, topk, starts=row_starts)
    return chosen.sub_(row_starts[:, None]).clamp_(min=-1)


fast_topk = fast_topk_v2  # what SGLang's JIT kernel of the same arguments is called


def fast_topk_transform_fused(
    score: Tensor,
    lengths: Tensor,
    page_table_size_1: Tensor,
    cu_seqlens_q: Tensor,
    topk: int,
    row_starts: Tensor | None = None,
) -> Tensor:
    """The chosen tokens' entries in the page table, whose pages hold one token.

    Args:
        page_table_size_1: int32 [requests, tokens].
        cu_seqlens_q: int32 [requests + 1]: rows ``cu_seqlens_q[r]`` to ``cu_seqlens_q[r + 1]`` belong to request r. Rows behind
            the last (padding of a CUDA graph) count as the last request's.
        The others are as in ``fast_topk_v2``.

    Returns:
        int32 [rows, topk].
    """
    requests = len(page_table_size_1)
    if row_starts is None and len(score) == requests:
        return select(score, lengths, topk, page_table=page_table_size_1, page=1)
    chosen = fast_topk_v2(score, lengths, topk, row_starts)
    row = torch.arange(len(score), dtype=cu_seqlens_q.dtype, device=score.device)
    request = torch.searchsorted(cu_seqlens_q, row, right=True).clamp_(max=requests) - 1
    return torch.where(chosen < 0, chosen, page_table_size_1[request[:, None], chosen.clamp(min=0)])


def fast_topk_transform_ragged_fused(
    score: Tensor,
    lengths: Tensor,
    topk_indices_offset: Tensor,
    topk: int,
    row_starts: Tensor | None = None,
) -> Tensor:
    """The chosen tokens' places in ragged keys: counted from the window's start, plus the row's offset.

    Args:
        topk_indices_offset: int32 [rows].
        The others are as in ``fast_topk_v2``.

    Returns:
        int32 [rows, topk].
    """
    chosen = fast_topk_v2(score, lengths, topk, row_starts)
    return torch.where(chosen < 0, chosen, chosen + topk_indices_offset[:, None])
