"""Quantising the indexer's queries and keys: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import QuantizeKernels
from .problem import QuantizeProblem, QuantizeSizes, QuantizeSpec

__all__ = ["OP", "Quantize", "QuantizeSizes", "QuantizeSpec"]


class Quantize(QuantizeProblem, QuantizeKernels, Op[QuantizeSpec, QuantizeSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Quantize()
