"""What is timed on several GPUs: prefill of whole sequences and decode of a batch, of one model."""

from __future__ import annotations

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


CASES = (Case("decode", 65536, 64), Case("prefill", 32768), Case("prefill", 131072), Case("decode", 262144, 64))
"""The shortest first: a run that is cut short has something."""
SMALL = (Case("decode", 256, 4, "tiny"), Case("prefill", 200, model="tiny"))
"""That a CPU runs in seconds."""
