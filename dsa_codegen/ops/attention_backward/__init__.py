"""The backward of sparse MLA: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import AttentionBackwardKernels
from .problem import AttentionBackwardProblem, AttentionBackwardSizes, AttentionBackwardSpec

__all__ = ["OP", "AttentionBackward", "AttentionBackwardSizes", "AttentionBackwardSpec"]


class AttentionBackward(AttentionBackwardProblem, AttentionBackwardKernels, Op[AttentionBackwardSpec, AttentionBackwardSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = AttentionBackward()
