"""Outcome: what became of one candidate, as a typed value that a journal keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from ..problem.op import Accuracy
from ..proof.timing import Policy, Timing


class Kind(str, Enum):
    """The ends that an evaluation can come to."""

    OK = "ok"
    INFEASIBLE = "infeasible"
    COMPILE_ERROR = "compile_error"
    COMPILE_TIMEOUT = "compile_timeout"
    LAUNCH_ERROR = "launch_error"
    RUN_TIMEOUT = "run_timeout"
    MISMATCH = "mismatch"
    OUT_OF_BOUNDS = "out_of_bounds"
    """It wrote beside its outputs."""
    OUT_OF_MEMORY = "out_of_memory"
    CONTEXT_LOST = "context_lost"
    """An error after which its process can no longer use the GPU: an illegal address, a failed assertion."""
    WORKER_DIED = "worker_died"


@dataclass(frozen=True)
class Outcome:
    """The end of one evaluation."""

    kind: Kind
    timing: Timing | None = None
    policy: Policy | None = None
    """How it was timed; None where it was modelled."""
    accuracy: Accuracy | None = None
    smem: int = 0
    """Most shared memory of a block over the kernels, in bytes; the first word in a tie."""
    dominated: bool = False
    """Timed by the quick probe only: it was more than twice as slow as the best."""
    detail: str = ""
    fatal: bool = False
    """The problem itself failed (its inputs or reference), whatever the candidate: the study ends."""

    @property
    def ok(self) -> bool:
        """Whether the candidate is right (and was timed, unless it only had to pass the gate)."""
        return self.kind is Kind.OK

    @property
    def time_us(self) -> float:
        """The objective of the search."""
        assert self.timing is not None, "only what was timed has a time"
        return self.timing.median

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``from_json`` reads back."""
        return {**asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        """Read what ``to_json`` wrote."""
        timing, policy, accuracy = values["timing"], values["policy"], values["accuracy"]
        return cls(
            **{
                **values,
                "kind": Kind(values["kind"]),
                "timing": Timing(**timing) if timing else None,
                "policy": Policy(**policy) if policy else None,
                "accuracy": Accuracy(**accuracy) if accuracy else None,
            }
        )
