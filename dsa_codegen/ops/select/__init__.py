"""Token selection: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import SelectKernels
from .problem import SelectProblem, SelectSizes, SelectSpec

__all__ = ["OP", "Select", "SelectSizes", "SelectSpec"]


class Select(SelectProblem, SelectKernels, Op[SelectSpec, SelectSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Select()
