"""Attention over parts of the tokens, joined by the logarithm of each part's denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functions import operators
from ..problem import checks


def merge_attention(out: Tensor, lse: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The attention over all tokens from those over disjoint parts of them. One launch.

    Args:
        out: bf16 or fp32 [parts, ..., heads, d], each computed without a sink; parts may lie anywhere, each is contiguous.
        lse: fp32 [parts, ..., heads], natural logarithms; -inf where a part has no token of a row,
            whatever ``out`` holds there.
        sink: fp32 [heads], a logit that joins the denominator, once; lse stays as it is.

    Returns:
        out [..., heads, d] of the same dtype, summed in fp32 in the order of the parts, and lse fp32 [..., heads]. A row
        without a token in any part gets 0 and -inf; NaN stays.
    """
    checks.check_kind("out", out, "Tensor")
    checks.tensor("out", out, (None,) * max(out.dim(), 3), (torch.bfloat16, torch.float32), inner_contiguous=True)
    checks.tensor("lse", lse, tuple(out.shape[:-1]), torch.float32, like=out, inner_contiguous=True)
    rows = out.shape[1:-1]
    queries = rows[:-1].numel()
    flat = out.reshape(len(out), queries, *out.shape[-2:]), lse.reshape(len(lse), queries, rows[-1])
    merged, total = operators.merge_attention(*flat, sink)
    return merged.view(out.shape[1:]), total.view(rows)
