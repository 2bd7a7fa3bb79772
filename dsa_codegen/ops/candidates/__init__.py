"""What a part of a sequence offers to a choice from all of it: the operation, joined of its problem and its kernels."""

from __future__ import annotations

from ...problem.op import Op
from .kernels import CandidatesKernels
from .problem import NO_TOKEN, CandidatesProblem, CandidatesSizes, CandidatesSpec

__all__ = ["NO_TOKEN", "OP", "Candidates", "CandidatesSizes", "CandidatesSpec"]


class Candidates(CandidatesProblem, CandidatesKernels, Op[CandidatesSpec, CandidatesSizes]):
    """What is asked (``problem``) and how it is computed (``kernels``)."""


OP = Candidates()
