"""Sparse MLA decode over paged FP8 caches: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import AttentionPagedKernels
from .problem import AttentionPagedProblem, AttentionPagedSizes, AttentionPagedSpec

__all__ = ["OP", "AttentionPaged", "AttentionPagedSizes", "AttentionPagedSpec"]


class AttentionPaged(AttentionPagedProblem, AttentionPagedKernels, Op[AttentionPagedSpec, AttentionPagedSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = AttentionPaged()
