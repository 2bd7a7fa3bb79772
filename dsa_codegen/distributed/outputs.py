"""Attention over parts of the tokens, joined by the logarithm of each part's denominator."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem import checks

_LEAST = torch.finfo(torch.float32).min  # of a logarithm: its share of anything is 0, and no part's is -inf minus -inf


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
    blank = (part.masked_fill(own.isneginf()[..., None], 0) for part, own in zip(out, lse, strict=True))
    return _joined(blank, lse, sink)


def joined(out: Tensor, lse: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``merge_attention`` of what our own functions computed, whose ``out`` is 0 where a part has no token: fewer launches."""
    return _joined(iter(out), lse, sink)


def _joined(parts: Iterator[Tensor], lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    total = functools.reduce(torch.logaddexp, lse)
    share = lse.clamp(min=_LEAST).softmax(0)  # of a row without a token any shares will do, as all its parts are 0
    if sink is not None:
        share = share * (total.clamp(min=_LEAST) - sink).sigmoid()
    first = next(parts)
    merged = first * share[0, ..., None]  # fp32; one part at a time, as in fp32 all of them take twice the memory
    for part, weight in zip(parts, share[1:], strict=True):
        merged.addcmul_(part, weight[..., None])
    return merged.to(first.dtype), total
