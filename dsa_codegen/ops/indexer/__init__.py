"""The prefill indexer: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import IndexerKernels
from .problem import IndexerProblem, IndexerSizes, IndexerSpec

__all__ = ["OP", "Indexer", "IndexerSizes", "IndexerSpec"]


class Indexer(IndexerProblem, IndexerKernels, Op[IndexerSpec, IndexerSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Indexer()
