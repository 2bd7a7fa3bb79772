"""FP8 with scales: groups to e4m3 and a scale each, and powers of two as e8m0 bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
"""Floor of a group's largest magnitude when its scale is chosen, so that a group of zeros has a finite scale."""


def quantize_groups(
    values: Tensor, group: int, power_of_two: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """e4m3 values [..., d] and fp32 scales [..., d // group] with ``values ≈ e4m3 * scale``.

    A scale is the group's largest magnitude over 448, or the next power of two above (what e8m0 can state). A group with a NaN
    is NaN, scale and all; one with an infinity has an infinite scale, hence is NaN once it is multiplied out.

    Args:
        scale: of all groups, in place of their own; what lies beyond 448 of it becomes 448 of it.
    """
    grouped = values.float().unflatten(-1, (values.shape[-1] // group, group))
    largest = grouped.abs().amax(-1).clamp_min(SMALLEST_AMAX)
    # Divided by a tensor: CUDA divides by a number through its reciprocal, one bit away from what the CPU stores.
    scales = largest / torch.full_like(largest, E4M3_MAX)
    if power_of_two:
        rounded = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scales = torch.where(scales.isnan(), scales, rounded)
    scales = scales.masked_fill(scales.isnan(), math.nan)  # one NaN, as the kernels store it
    if scale is not None:
        scales = torch.full_like(scales, scale)
    quantized = (grouped / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    quantized = quantized.masked_fill(quantized.isnan(), math.nan)  # without a sign
    return quantized.flatten(-2).to(torch.float8_e4m3fn), scales


def e8m0_encode(scales: Tensor) -> Tensor:
    """The e8m0 byte (exponent + 127) of positive fp32 powers of two; anything between is rounded up.

    What is not finite becomes 255, NaN.
    """
    mantissa, exponent = torch.frexp(scales.float())
    bytes_ = (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254)
    return bytes_.masked_fill(~scales.isfinite(), 255).to(torch.uint8)


def e8m0_decode(scales: Tensor) -> Tensor:
    """fp32 powers of two of e8m0 bytes; 255 is NaN."""
    values = torch.ldexp(torch.ones(scales.shape, dtype=torch.float32, device=scales.device), scales.int() - 127)
    return values.masked_fill(scales == 255, float("nan"))
