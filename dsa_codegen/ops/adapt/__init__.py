"""The adaptive choice: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import AdaptKernels
from .problem import AdaptProblem, AdaptSizes, AdaptSpec

__all__ = ["OP", "Adapt", "AdaptSizes", "AdaptSpec"]


class Adapt(AdaptProblem, AdaptKernels, Op[AdaptSpec, AdaptSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Adapt()
