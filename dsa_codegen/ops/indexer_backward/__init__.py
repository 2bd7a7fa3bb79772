"""What the indexer learns from: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import IndexerBackwardKernels
from .problem import IndexerBackwardProblem, IndexerBackwardSizes, IndexerBackwardSpec

__all__ = ["OP", "IndexerBackward", "IndexerBackwardSizes", "IndexerBackwardSpec"]


class IndexerBackward(IndexerBackwardProblem, IndexerBackwardKernels, Op[IndexerBackwardSpec, IndexerBackwardSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = IndexerBackward()
