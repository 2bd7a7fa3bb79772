"""What the prologues share: rotary position, their arguments, and how quantised rows are compared with exact ones.

A table ``cos_sin`` holds the angles of each position: d_rope / 2 cosines, then as many sines, as engines keep them. Channels
are paired in one of two styles: "half_split" pairs channel i with i + d_rope / 2, "interleaved" pairs 2i with 2i + 1. A pair
(a, b) becomes (a · cos - b · sin, b · cos + a · sin), where it stands (RoFormer, equation 34).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import checks, quantization
from ..problem.draw import Draw
from ..problem.op import Accuracy, Config, Violation
from ..problem.values import Scalar, next_power_of_two
from . import rows

STYLES = ("half_split", "interleaved")
NORM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORM_NAMES = {dtype: name for name, dtype in NORM_DTYPES.items()}
D_ROPES = tuple(range(16, 129, 16))
_POSITIONS = 50  # of the tables that are drawn
_SLACK = 2e-5
"""What fp32 sums in another order may move a value by, as a share of its row's largest."""
_E4M3_STEP = 2.0**-9  # between the least numbers of e4m3
_E4M3_BITS = 3  # of a mantissa


def check_positions(cos_sin: object, positions: object, tokens: int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Check a table [positions, d_rope] and int64 positions [tokens]; both None where no channel is rotary."""
    if cos_sin is None and positions is None:
        return None, None
    table = checks.tensor("cos_sin", cos_sin, (None, None), torch.float32, like=like)
    if table.shape[1] not in D_ROPES or not table.shape[0]:
        allowed = f"shape [1 or more, {D_ROPES[0]} to {D_ROPES[-1]} in steps of 16]"
        raise InputError("cos_sin", f"shape {list(table.shape)}", allowed)
    return table, checks.tensor("positions", positions, (tokens,), torch.int64, like=like)


def check_eps(eps: float) -> float:
    """Check what is added to a variance."""
    if not isinstance(eps, torch.SymFloat) and not (math.isfinite(eps) and eps > 0):
        raise InputError("eps", eps, "a positive number")
    return eps


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor, style: str) -> Tensor:
    """fp32 [tokens, ..., d_rope] of the same shape in fp32; NaN where the table does not have a token's position."""
    known = (positions >= 0) & (positions < len(cos_sin))
    angles = torch.where(known[:, None], cos_sin[positions.clamp(0, len(cos_sin) - 1)], math.nan)
    cos, sin = angles.view(len(x), *(1 for _ in x.shape[2:]), cos_sin.shape[1]).chunk(2, -1)
    if style == "half_split":
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def draw_positions(draw: Draw, tokens: int, d_rope: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(a table as rotary embeddings make it, positions that it has); none of no channels."""
    if not d_rope:
        return None, None
    rates = 10000.0 ** (-torch.arange(0, d_rope, 2, device=draw.device) / d_rope)
    angles = torch.arange(_POSITIONS, device=draw.device)[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), 1), draw.integers(0, _POSITIONS, tokens, dtype=torch.int64)


def draw_rows(draw: Draw, tokens: int, *shape: int) -> Tensor:
    """bf16 rows of different magnitudes, one of zeros; none so large that its square overflows."""
    drawn = draw.normal(tokens, *shape) * draw.normal(tokens, *(1 for _ in shape), scale=2.0).exp()
    if tokens > 1:
        drawn[1] = 0
    return drawn.bfloat16()


def template_names(d_rope: int, width: int, first: int) -> dict[str, Scalar]:
    """What a template must know of ``d_rope`` rotary channels in a row of ``width``, the first of which is ``first``."""
    half = d_rope // 2 or width
    lanes = min(half & -half, width & -width)  # a power of two that divides both
    parts, span, rope_part = width // lanes, half // lanes, first // lanes
    return {
        "half": lanes,
        "d_angles": d_rope,
        "parts": next_power_of_two(parts),
        "rope_part": rope_part,
        "in_row": parts,
        "span": span,
        "paired_by_bit": span == 1 and rope_part % 2 == 0,
    }


def later(config: Config) -> int:
    """Slots that are compared with a program's rows at a time: 8 comparisons a thread."""
    return min(1024, max(4, 256 * config["num_warps"] // config["block_t"]))


def fits_registers(config: Config, count: int, width: int) -> Iterable[Violation]:
    """``count`` rows of a program, exact, rotated and quantised."""
    yield from rows.values_per_thread(Config.of(config.backend, block_t=count, num_warps=config["num_warps"]), width)


def compare_quantised(
    name: str, values: Tensor, scales: Tensor, exact: Tensor, group: int, power_of_two: bool, shared: float | None = None
) -> Accuracy:
    """Whether e4m3 rows are roundings of ``exact`` with the scales that belong to it.

    The scale is that of the exact group's largest magnitude, which another order of summation moves by ``slack`` of itself, and
    every value lies within half a step of e4m3 (and the slack) of the exact one. Groups that are not finite are so in both.

    Args:
        values: e4m3 [rows, channels].
        scales: fp32 [rows, channels // group].
        exact: fp32 [rows, channels].
        shared: the scale of all groups, where they have none of their own: beyond 448 of it there is nothing.
    """
    slack = _SLACK
    if shared is not None:
        exact = exact.clamp(-448 * shared, 448 * shared)
    grouped = exact.unflatten(-1, (-1, group))
    stored = values.float().unflatten(-1, (-1, group))
    broken = ~grouped.isfinite().all(-1)
    shown = ~(stored * scales.unsqueeze(-1)).isfinite()
    if not torch.equal(shown, broken.unsqueeze(-1).expand_as(shown)):
        return Accuracy(False, math.inf, math.inf, f"{name}: other groups are not finite than the reference's")
    largest = grouped.abs().amax(-1)
    low, high = (
        quantization.quantize_groups(grouped * factor, group, power_of_two, shared)[1][..., 0]
        for factor in (1 - slack, 1 + slack)
    )
    scaled = (scales >= low * (1 - slack)) & (scales <= high * (1 + slack))
    step = _step(stored) * scales.unsqueeze(-1)
    distance = (stored * scales.unsqueeze(-1) - grouped).abs()
    near = (distance <= 0.5 * step * (1 + slack) + 2 * slack * largest.unsqueeze(-1)).all(-1)
    wrong = int((~((scaled & near) | broken)).sum())
    worst = distance[~broken].max().item() if distance[~broken].numel() else 0.0
    return Accuracy(wrong == 0, worst, 0.0, "" if not wrong else f"{name}: {wrong} of {scales.numel()} groups are no rounding")


def _step(values: Tensor) -> Tensor:
    """The distance between neighbours of e4m3 at these values."""
    _, exponent = torch.frexp(values.abs())
    return torch.ldexp(torch.ones_like(values), exponent - 1 - _E4M3_BITS).clamp_min(_E4M3_STEP)
