"""Storing into paged FP8 caches: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import QuantizePagedKernels
from .problem import QuantizePagedProblem, QuantizePagedSizes, QuantizePagedSpec

__all__ = ["OP", "QuantizePaged", "QuantizePagedSizes", "QuantizePagedSpec"]


class QuantizePaged(QuantizePagedProblem, QuantizePagedKernels, Op[QuantizePagedSpec, QuantizePagedSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = QuantizePaged()
