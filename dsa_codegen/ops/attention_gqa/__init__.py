"""Sparse grouped-query attention: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import AttentionGqaKernels
from .problem import AttentionGqaProblem, AttentionGqaSizes, AttentionGqaSpec

__all__ = ["OP", "AttentionGqa", "AttentionGqaSizes", "AttentionGqaSpec"]


class AttentionGqa(AttentionGqaProblem, AttentionGqaKernels, Op[AttentionGqaSpec, AttentionGqaSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = AttentionGqa()
