"""What both attention operations give (out, lse, on demand the highest scores), and what both ask of scalars and buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import checks, compare
from ..problem.op import Accuracy, Inputs, Outputs


def check_scale(sm_scale: float) -> None:
    """Raise InputError unless scores keep their order under the scale: kernels take a running maximum of them."""
    if not 0 < sm_scale < math.inf:
        raise InputError("sm_scale", str(sm_scale), "a positive number")


def check_buffers(
    names: Sequence[str], brought: Sequence[object], rows: Sequence[int], d_v: int, q: Tensor
) -> dict[str, Tensor]:
    """Check the buffers of ``names`` that a caller brought: out [*rows, d_v] of the results' dtype, the others fp32 rows."""
    buffers = {}
    for name, value in zip(names, brought, strict=False):
        if value is not None:
            shape, dtype = ((*rows, d_v), result_dtype(q)) if name == "out" else (rows, torch.float32)
            buffers[name] = checks.tensor(name, value, shape, dtype, like=q)
    return buffers


def result_dtype(q: Tensor) -> torch.dtype:
    """Of ``out``: that of the queries, and bf16 where they are FP8."""
    return torch.bfloat16 if q.dtype is checks.FP8 else q.dtype


def attended(inputs: Inputs, rows: Sequence[int], d_v: int, max_logits: bool = False) -> Outputs:
    """The buffers that came with the inputs; where there is none, uninitialised memory."""
    q = inputs["q"]
    device = q.device
    out, lse, highest = (inputs.get(name) for name in ("out", "lse", "max_logits"))
    results = {
        "out": torch.empty(*rows, d_v, dtype=result_dtype(q), device=device) if out is None else out,
        "lse": torch.empty(*rows, dtype=torch.float32, device=device) if lse is None else lse,
    }
    if max_logits:
        results["max_logits"] = torch.empty(*rows, dtype=torch.float32, device=device) if highest is None else highest
    return results


def compare_attended(
    outputs: Outputs,
    reference: Outputs,
    out: compare.Limit = compare.ATTENTION,
    statistic: compare.Limit = compare.LSE,
    magnitude: Callable[[], Tensor] | None = None,
) -> Accuracy:
    """Compare ``out``, and ``lse`` and ``max_logits`` where there are any, within the limits of attention or those given.

    Args:
        magnitude: makes ``Σ_i softmax(s)[i] · |value[i]|`` of each element of ``out``, where that is beyond its limit: what
            rounding the weights may do to it (``compare.WEIGHT_ROUNDING``).
    """
    statistics = (name for name in reference if name != "out")
    compared = compare.close("out", outputs["out"], reference["out"], out)
    if not compared.passed and magnitude is not None and compared.similarity < out.similarity:
        slack = (compare.WEIGHT_ROUNDING * magnitude()).clamp(min=out.absolute)
        compared = compare.close("out", outputs["out"], reference["out"], out, slack)
    return compare.worst(
        compared,
        *(compare.close(name, outputs[name], reference[name], statistic) for name in statistics),
    )
