"""What is timed on several GPUs: prefill of whole sequences and decode of a batch, of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...problem.presets import Model, preset


@dataclass(frozen=True)
class Case:
    """One step of a layer. Frozen, and small where a test makes it."""

    stage: str
    """"prefill" of a sequence of ``context`` tokens, or "decode" of ``batch`` sequences of that length."""
    context: int
    batch: int = 1
    model: str = "deepseek-v3.2"
    least: int = 1
    """GPUs that it needs: groups of fewer do not hold it. One GPU then takes its rows in so many stretches, as engines do."""

    @property
    def shape(self) -> dict[str, int]:
        """As rows of results state it, but for the number of ranks."""
        model = preset(self.model)
        size = {"queries": self.context} if self.stage == "prefill" else {"batch": self.batch, "next_n": 1}
        return {**size, "context": self.context, "heads": model.heads, "k": model.topk}

    def of_rank(self, world: int) -> Model:
        """The model with the heads of one of ``world`` tensor-parallel ranks."""
        model = preset(self.model)
        return replace(model, heads=model.heads // world)


CASES = (
    Case("decode", 65536, 64),
    Case("prefill", 32768),
    Case("prefill", 131072),
    Case("decode", 262144, 64),
    Case("prefill", 1 << 20, least=8),  # queries of 154 GB, some 75 GB a GPU with all else
)
"""The shortest first: a run that is cut short has something."""
SMALL = (Case("decode", 256, 4, "tiny"), Case("prefill", 200, model="tiny"), Case("prefill", 320, model="tiny", least=8))
"""That a CPU runs in seconds."""


def served(cases: Sequence[Case], devices: int) -> list[Case]:
    """Those that so many GPUs hold together."""
    return [case for case in cases if case.least <= devices]


def groups(case: Case, sizes: Sequence[int]) -> list[int]:
    """Of the sizes of groups those that a case is timed in: one GPU, and all that hold it."""
    return [world for world in sizes if world == 1 or world >= case.least]
