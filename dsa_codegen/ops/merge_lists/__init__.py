"""Candidates of several parts in the order of the sequence: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import MergeListsKernels
from .problem import MOST_PARTS, MergeListsProblem, MergeListsSizes, MergeListsSpec

__all__ = ["MOST_PARTS", "OP", "MergeLists", "MergeListsSizes", "MergeListsSpec"]


class MergeLists(MergeListsProblem, MergeListsKernels, Op[MergeListsSpec, MergeListsSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = MergeLists()
