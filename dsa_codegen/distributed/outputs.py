"""Attention over parts of the tokens, joined by the logarithm of each part's denominator."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..problem import checks


def merge_attention(out: Tensor, lse: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The attention over all tokens from those over disjoint parts of them.

    Args:
        out: bf16 or fp32 [parts, ..., heads, d], each computed without a sink.
        lse: fp32 [parts, ..., heads], natural logarithms; -inf where a part has no token of a row,
            whatever ``out`` holds there.
        sink: fp32 [heads], a logit that joins the denominator, once; lse stays as it is.

    Returns:
        out [..., heads, d] of the same dtype, summed in fp32 in the order of the parts, and lse fp32 [..., heads]. A row
        without a token in any part gets 0 and -inf; NaN stays.
    """
    checks.check_kind("out", out, "Tensor")
    checks.tensor("out", out, (None,) * out.dim(), (torch.bfloat16, torch.float32), inner_contiguous=True)
    lse = checks.tensor("lse", lse, tuple(out.shape[:-1]), torch.float32, like=out, inner_contiguous=True)
    if sink is not None:
        sink = checks.tensor("sink", sink, (out.shape[-2],), torch.float32, like=out)
    total = functools.reduce(torch.logaddexp, lse)
    empty = total.isneginf()
    share = (lse - total.masked_fill(empty, 0)).exp()
    if sink is not None:
        share = (share * (total - sink).sigmoid()).masked_fill(empty, 0)
    merged = torch.zeros(out.shape[1:], dtype=torch.float32, device=out.device)
    for part, own, weight in zip(out, lse, share, strict=True):  # one at a time: in fp32 all of them take twice the memory
        merged.addcmul_(part.masked_fill(own.isneginf()[..., None], 0), weight[..., None])
    return merged.to(out.dtype), total
