"""Sparse MLA of FP8 products (``math="fp8"``): queries and tokens in e4m3 with a scale each, weights rounded to e4m3.

``s[h,i] = sm_scale · q_scale[h] · kv_scale[t] · (q[h] · kv[t])`` with ``t = indices[i]``, and ``out[h]`` is
``Σ_i w[h,i] · kv[t, :d_v] / Σ_i exp(s[h,i])`` where ``w = exp(s) · kv_scale[t]`` is rounded to e4m3: a token's scale is in
its weight, so that the product takes its values as they are stored. Rounding is relative; only what is below 2^-11 of a row's
largest weight loses digits, and depends on how far a kernel's running maximum has come. lse and the denominator are sums of
the weights before they are rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, quantization
from ...problem.draw import Draw
from ...problem.op import Inputs, Outputs

MATHS = ("bf16", "fp8")
TOP = 8
"""The largest weight of a row is in (2^7, 2^8] when it is rounded: e4m3 ends at 448."""
UNDECIDED = 1e-2
"""Relative: a weight so near to a boundary of e4m3 may fall to either side, as scores and lse are off by up to so much."""
_SETTLED = 8  # weights of a head, those that move its output most
_LARGEST = 126  # the code of 448


def check_scales(q: Tensor, kv: Tensor, math_: str, q_scale: object, kv_scale: object) -> dict[str, Tensor | None]:
    """Check the scales of FP8 queries and tokens; of others there are none.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    if math_ != "fp8":
        for name, scale in (("q_scale", q_scale), ("kv_scale", kv_scale)):
            if scale is not None:
                raise InputError(name, type(scale).__name__, 'None, unless math is "fp8"')
        return {}
    return {
        "q_scale": checks.tensor("q_scale", q_scale, q.shape[:2], torch.float32, like=q),
        "kv_scale": checks.tensor("kv_scale", kv_scale, kv.shape[:2], torch.float32, like=q),
    }


def quantised(draw: Draw, inputs: Inputs) -> Inputs:
    """The inputs in e4m3, tokens of magnitudes that differ by up to 4: a scale that is another token's shows."""
    size = draw.uniform(len(inputs["kv"]), 1, 1, low=-1.0, high=1.0).exp2()
    made = {}
    for name, values in (("q", inputs["q"]), ("kv", inputs["kv"] * size)):
        made[name], scales = quantization.quantize_groups(values, values.shape[-1])
        made[f"{name}_scale"] = scales[..., 0]
    return {**inputs, **made}


def attend(inputs: Inputs, rows: slice, d_v: int) -> Outputs:
    """What some queries get, in fp32 but for the weights."""
    found = _weigh(inputs, rows)
    out = torch.einsum("qhk,qkd->qhd", found.weights.to(torch.float8_e4m3fn).float(), found.latent[..., :d_v])
    return {"out": out / found.total, "lse": found.lse}


def settled(out: Tensor, inputs: Inputs, rows: slice, d_v: int) -> Tensor:
    """The reference's ``out`` with weights that score errors may round to either side on the side that is nearer to an output.

    A sum of products on Hopper is off in its last bits, and weights near a boundary of e4m3 fall to its other side, up to 1/8
    of themselves away. Where a few tokens have most of a head's weight, that is as much of the output. Only sides of weights so
    near to a boundary are settled, and of a head no more than eight: eight numbers that fit hundreds of channels hide nothing
    else. Of 1050 draws on an H200 right outputs are up to 1e-3 away before and 5.7e-6 after (7.9e-6 of steep scores); with one
    token of each list of 200 or 333 left out, 86 of 100 are beyond 3e-5.

    Args:
        out: of these ``rows``, a kernel's.
    """
    found = _weigh(inputs, rows)
    value, code = found.latent[..., :d_v], found.weights.to(torch.float8_e4m3fn)
    rounded = code.float()
    up = (found.weights > rounded).int()
    beyond = (code.view(torch.uint8).int() + 2 * up - 1).clamp(0, _LARGEST).to(torch.uint8).view(torch.float8_e4m3fn).float()
    undecided = (found.weights - (rounded + beyond) / 2).abs() <= UNDECIDED * found.weights
    step = torch.where(undecided, beyond - rounded, 0.0) / found.total
    heaviest = (step.abs() * value.norm(dim=-1)[:, None]).topk(min(_SETTLED, step.shape[-1]), -1).indices
    rest = out.float() - torch.einsum("qhk,qkd->qhd", rounded, value) / found.total
    query = torch.arange(len(value), device=value.device)[:, None]
    for token in heaviest.unbind(-1):
        moved = step.gather(-1, token[..., None]) * value[query, token]
        nearer = (rest * moved).sum(-1, keepdim=True) > (moved * moved).sum(-1, keepdim=True) / 2
        rest = torch.where(nearer, rest - moved, rest)
    return out.float() - rest


@dataclass(frozen=True)
class _Weighed:
    latent: Tensor
    """fp32 [queries, k, d_qk], without the tokens' scales."""
    weights: Tensor
    """fp32 [queries, heads, k], with the tokens' scales, not rounded yet."""
    total: Tensor
    """fp32 [queries, heads, 1], the sink's share included; 1 where there is nothing."""
    lse: Tensor


def _weigh(inputs: Inputs, rows: slice) -> _Weighed:
    q, kv, chosen = inputs["q"][rows].float(), inputs["kv"][:, 0], inputs["indices"][rows, 0].long()
    valid = (chosen >= 0) & (chosen < len(kv))
    if inputs["lengths"] is not None:
        valid &= torch.arange(chosen.shape[1], device=q.device) < inputs["lengths"][rows, None]
    latent = torch.zeros(*chosen.shape, q.shape[2], device=q.device)
    latent[valid] = kv[chosen[valid]].float()
    scale = torch.ones(chosen.shape, device=q.device)
    scale[valid] = inputs["kv_scale"][chosen[valid], 0]
    scale = scale[:, None]
    factor = inputs["q_scale"][rows, :, None] * (inputs["sm_scale"] * math.log2(math.e))
    scores = (torch.einsum("qhd,qkd->qhk", q, latent) * factor * scale).masked_fill(~valid[:, None], -math.inf)
    peak = (scores + scale.log2()).amax(-1, keepdim=True).ceil().clamp_min(-1e30) - TOP
    weights = torch.exp2(scores - peak)
    total = weights.sum(-1, keepdim=True)
    lse = ((peak + total.log2()) * math.log(2))[..., 0]
    if inputs["sink"] is not None:
        total = total + torch.exp2(inputs["sink"][:, None] * math.log2(math.e) - peak)
    return _Weighed(latent, weights * scale, torch.where(total == 0, 1.0, total), lse)
