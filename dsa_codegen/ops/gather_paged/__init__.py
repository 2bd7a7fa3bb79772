"""Gathering from paged FP8 caches: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import GatherPagedKernels
from .problem import GatherPagedProblem, GatherPagedSizes, GatherPagedSpec

__all__ = ["OP", "GatherPaged", "GatherPagedSizes", "GatherPagedSpec"]


class GatherPaged(GatherPagedProblem, GatherPagedKernels, Op[GatherPagedSpec, GatherPagedSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = GatherPaged()
