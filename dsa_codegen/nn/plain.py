"""The prologues in torch, for what is not quantised: scores of the model's own dtype, latents that no kernel stores (fp32)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.rotated import rotate
from .step import Step


def index_rows(q: Tensor, k: Tensor, norm: nn.LayerNorm, style: str, step: Step) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, d] and k [tokens, d] of the indexer with norm and position, in the dtypes that they came in.

    No Hadamard rotation: it spreads what quantising would lose, and leaves products as they are.
    """
    normalised = nn.functional.layer_norm(
        k.float(), k.shape[-1:], norm.weight.float(), None if norm.bias is None else norm.bias.float(), norm.eps
    )
    return _turned(q, style, step), _turned(normalised, style, step).to(k.dtype)


def latent_rows(latent: Tensor, norm: nn.RMSNorm, style: str, step: Step) -> Tensor:
    """Latents [tokens, d_nope + d_rope] with norm and position."""
    width = len(norm.weight)
    nope = nn.functional.rms_norm(latent[:, :width].float(), (width,), norm.weight.float(), norm.eps)
    rope = _turned(latent[:, width:], style, step)
    return torch.cat((nope.to(latent.dtype), rope), 1)


def folded(weights: Tensor, heads: int, width: int) -> Tensor:
    """fp32 weights with heads^-0.5 and head_dim^-0.5; there is no scale to fold."""
    return weights.float() * float((heads * width) ** -0.5)


def store(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Write rows to their slots. What has none (-1) goes to the last row of the cache, which no sequence is ever given."""
    cache.flatten(0, 2)[slots] = rows.to(cache.dtype)


def rows_at(slots: Tensor, cache: Tensor) -> Tensor:
    """Rows [n, d] of a plain cache."""
    return cache.flatten(0, 2)[slots]


def _turned(x: Tensor, style: str, step: Step) -> Tensor:
    """Position on the first channels, as many as the table has."""
    d_rope = step.cos_sin.shape[1]
    turned = rotate(x[..., :d_rope].float(), step.cos_sin, step.positions, style).to(x.dtype)
    return torch.cat((turned, x[..., d_rope:]), -1)
