"""The latent's prologue: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import LatentPrologueKernels
from .problem import LatentPrologueProblem, LatentPrologueSizes, LatentPrologueSpec

__all__ = ["OP", "LatentPrologue", "LatentPrologueSizes", "LatentPrologueSpec"]


class LatentPrologue(LatentPrologueProblem, LatentPrologueKernels, Op[LatentPrologueSpec, LatentPrologueSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = LatentPrologue()
