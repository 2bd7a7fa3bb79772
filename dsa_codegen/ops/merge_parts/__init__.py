"""Attention over all tokens from attention over parts of them: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import MergePartsKernels
from .problem import MergePartsProblem, MergePartsSizes, MergePartsSpec

__all__ = ["OP", "MergeParts", "MergePartsSizes", "MergePartsSpec"]


class MergeParts(MergePartsProblem, MergePartsKernels, Op[MergePartsSpec, MergePartsSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = MergeParts()
