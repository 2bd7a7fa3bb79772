"""Chosen blocks to tokens: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import ExpandKernels
from .problem import ExpandProblem, ExpandSizes, ExpandSpec

__all__ = ["OP", "Expand", "ExpandSizes", "ExpandSpec"]


class Expand(ExpandProblem, ExpandKernels, Op[ExpandSpec, ExpandSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Expand()
