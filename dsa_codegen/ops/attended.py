"""What both attention operations give, out and lse, and what both ask of their scalars."""

from __future__ import annotations

import math

from ..errors import InputError
from ..problem import compare
from ..problem.op import Accuracy, Outputs


def check_scale(sm_scale: float) -> None:
    """Raise InputError unless scores keep their order under the scale: kernels take a running maximum of them."""
    if not 0 < sm_scale < math.inf:
        raise InputError("sm_scale", str(sm_scale), "a positive number")


def compare_attended(outputs: Outputs, reference: Outputs) -> Accuracy:
    """Compare ``out`` and ``lse`` within the limits of attention."""
    return compare.worst(
        compare.close("out", outputs["out"], reference["out"], compare.ATTENTION),
        compare.close("lse", outputs["lse"], reference["lse"], compare.LSE),
    )
