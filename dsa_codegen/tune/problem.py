"""Problem and entrant: what crosses the border to the process that uses the GPU; plain values, quick to import."""

from __future__ import annotations

from dataclasses import dataclass

from ..gpu import Gpu
from ..kernels.build import Built
from ..problem.op import Case, Config, Op
from ..problem.values import Spec
from .space import Candidate


@dataclass(frozen=True)
class Problem:
    """An operation, its spec and the case that is timed."""

    op: Op
    spec: Spec
    case: Case
    gpu: Gpu

    @property
    def id(self) -> str:
        """Unique among problems."""
        return f"{self.op.name}/{self.spec.id}/{self.case.id}"


@dataclass(frozen=True)
class Entrant:
    """A candidate with its build: all that the worker needs to run it."""

    candidate: Candidate
    built: Built

    @property
    def config(self) -> Config:
        """The candidate's config."""
        return self.candidate.config
