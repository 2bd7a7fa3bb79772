"""Sums in an order that is stated: what references compute where a spec is batch invariant.

A matrix product of torch adds up in an order that depends on how many rows and columns come together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem.checks import FP8
from ..problem.values import next_power_of_two
from .logits import exact

_PRODUCTS = 1 << 24  # that are held at once


def scores(q: Tensor, k: Tensor, k_scale: Tensor | None, weights: Tensor, score: str) -> Tensor:
    """The indexer's scores [queries, tokens]; one depends on its query's and its token's rows alone, bit for bit.

    Args:
        q: [queries, heads, head_dim].
        k: [tokens, head_dim], as stored.
        k_scale: fp32 [tokens]; None where nothing is quantised.
        weights: fp32 [queries, heads].
        score: "weighted_relu" or "relu_bias".
    """
    dtype = exact(q).dtype
    total = torch.zeros(len(q), len(k), dtype=dtype, device=q.device)
    for head in range(q.shape[1]):
        weight = weights[:, head, None]
        products = dots(q[:, head], k).to(dtype)
        if k_scale is not None:
            products = products * k_scale
        total = total + (weight * products.relu() if score == "weighted_relu" else (products + weight).relu())
    return total


def dots(a: Tensor, b: Tensor) -> Tensor:
    """a [n, d] · b [m, d] -> [n, m]; zeros make d a power of two."""
    if a.dtype is FP8 and b.dtype is FP8:
        # Products of e4m3 are multiples of 2^-18 below 2^18: 256 of them are exact in 53 bits, in any order.
        return a.double() @ b.double().T
    a, b = exact(a), exact(b)
    step = max(1, _PRODUCTS // max(b.numel(), 1))
    parts = [_halved(a[first : first + step, None] * b) for first in range(0, len(a), step)]
    return torch.cat(parts) if parts else a.new_empty(0, len(b))


def _halved(terms: Tensor) -> Tensor:
    """Sums over the last dimension: the first half and the second are added, until one is left."""
    width = terms.shape[-1]
    if width & (width - 1):
        terms = torch.nn.functional.pad(terms, (0, next_power_of_two(width) - width))
    while terms.shape[-1] > 1:
        low, high = terms.chunk(2, -1)
        terms = low + high
    return terms[..., 0]
