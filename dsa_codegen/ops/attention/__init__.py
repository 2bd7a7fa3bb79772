"""Sparse MLA prefill: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import AttentionKernels
from .problem import AttentionProblem, AttentionSizes, AttentionSpec

__all__ = ["OP", "Attention", "AttentionSizes", "AttentionSpec"]


class Attention(AttentionProblem, AttentionKernels, Op[AttentionSpec, AttentionSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Attention()
