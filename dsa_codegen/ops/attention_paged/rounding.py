"""Rounding: what lse may differ by where a scale of 24 bits is kept as two bf16, and a latent is rounded to the other side.

The lower half is off by up to 2^-17 of the scale's power of two, and its product with an e4m3 is a bf16 too: a latent is off
by up to 2^-15 before it is rounded to bf16, and where that is near the middle between two (0.8 % of random ones) it may become
the other (0.06 % do). Lists of many tokens average that out; of few, a score moves by an element of the query times 2^-8 of one
of the token. Powers of two are exact, and so are CUDA C++ and the compiler's conversion.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...problem.op import Inputs

_NEAR = 249  # units of 2^-23: 1.875 · 2^-17 of the lower half (an e4m3 is at most 1.875), 2^-16 of its product, and one more
_MIDDLE = 1 << 15  # of the 16 bits that rounding to bf16 drops
_SPREAD = 6.0  # standard deviations: signs are independent, and 1 of 10^8 values may be further off (Hoeffding)


def undecided(latents: Tensor) -> Tensor:
    """What elements of fp32 ``latents`` move by if they are rounded to the other side; 0 where that is sure not to happen."""
    bits = latents.view(torch.int32)
    near = ((bits & 0xFFFF) - _MIDDLE).abs() <= _NEAR
    unit = torch.ldexp(torch.ones_like(latents), torch.frexp(latents)[1] - 8)
    return torch.where(near & (latents != 0), unit, 0.0)


def slack_of_lse(inputs: Inputs, lse: Tensor, stated: Callable[[int, int], Tensor]) -> Tensor:
    """What each value of ``lse`` [batch, next_n, heads] may differ by, fp32.

    Args:
        stated: (sequence, query) -> fp32 latents [tokens, d_qk] that its entries state, not rounded.
    """
    slack = torch.zeros_like(lse)
    for row, query in torch.cartesian_prod(*(torch.arange(size) for size in lse.shape[:2])).tolist():
        latents, q = stated(row, query), inputs["q"][row, query].float()
        scores = q @ latents.bfloat16().float().T * inputs["sm_scale"]
        weights, unit = scores.softmax(-1), undecided(latents)
        most = (weights @ unit * q.abs()).sum(-1)
        spread = (weights.square() @ unit.square() * q.square()).sum(-1).sqrt()
        slack[row, query] = inputs["sm_scale"] * torch.minimum(most, _SPREAD * spread)
    return slack
