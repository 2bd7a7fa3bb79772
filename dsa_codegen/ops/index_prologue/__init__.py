"""The indexer's prologue: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import IndexPrologueKernels
from .problem import IndexPrologueProblem, IndexPrologueSizes, IndexPrologueSpec

__all__ = ["OP", "IndexPrologue", "IndexPrologueSizes", "IndexPrologueSpec"]


class IndexPrologue(IndexPrologueProblem, IndexPrologueKernels, Op[IndexPrologueSpec, IndexPrologueSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = IndexPrologue()
