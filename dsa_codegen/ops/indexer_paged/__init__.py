"""The paged indexer: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import IndexerPagedKernels
from .problem import IndexerPagedProblem, IndexerPagedSizes, IndexerPagedSpec

__all__ = ["OP", "IndexerPaged", "IndexerPagedSizes", "IndexerPagedSpec"]


class IndexerPaged(IndexerPagedProblem, IndexerPagedKernels, Op[IndexerPagedSpec, IndexerPagedSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = IndexerPaged()
