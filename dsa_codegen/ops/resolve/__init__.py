"""A choice against what is at hand: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import ResolveKernels
from .problem import ResolveProblem, ResolveSizes, ResolveSpec

__all__ = ["OP", "Resolve", "ResolveSizes", "ResolveSpec"]


class Resolve(ResolveProblem, ResolveKernels, Op[ResolveSpec, ResolveSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Resolve()
