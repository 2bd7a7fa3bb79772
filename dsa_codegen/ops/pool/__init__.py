"""Keys pooled in blocks: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import PoolKernels
from .problem import PoolProblem, PoolSizes, PoolSpec

__all__ = ["OP", "Pool", "PoolSizes", "PoolSpec"]


class Pool(PoolProblem, PoolKernels, Op[PoolSpec, PoolSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Pool()
