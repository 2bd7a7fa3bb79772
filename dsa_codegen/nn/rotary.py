"""Rotary position in torch: the table that the prologues read, and attention's queries, whose products are torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rotated import rotate


def rotary_table(positions: int, d_rope: int, base: float = 10000.0, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [positions, d_rope]: d_rope / 2 cosines and as many sines of each position.

    Channel pair i turns by ``base^(-2i / d_rope)`` a position (RoFormer, equation 15). Of models with another schedule (YaRN)
    make the table as they do: ``torch.cat((cos, sin), 1)``.
    """
    rates = base ** (-torch.arange(0, d_rope, 2, dtype=torch.float64, device=device) / d_rope)
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), 1).float()


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor, style: str) -> Tensor:
    """``x`` [tokens, heads, d_rope] with its position, computed in fp32, in the dtype that it came in."""
    return rotate(x.float(), cos_sin, positions, style).to(x.dtype)
