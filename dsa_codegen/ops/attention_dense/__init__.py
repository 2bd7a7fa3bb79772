"""Dense MLA over windows: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import AttentionDenseKernels
from .problem import AttentionDenseProblem, AttentionDenseSizes, AttentionDenseSpec

__all__ = ["OP", "AttentionDense", "AttentionDenseSizes", "AttentionDenseSpec"]


class AttentionDense(AttentionDenseProblem, AttentionDenseKernels, Op[AttentionDenseSpec, AttentionDenseSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = AttentionDense()
