"""Shape: what a layer has around the stages that a ``Model`` states: widths of projections, styles of rotary position."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.rotated import STYLES
from ..problem.values import Value


@dataclass(frozen=True)
class Shape(Value):
    """The projections of a layer; the defaults are DeepSeek-V3.2's."""

    hidden: int
    """Channels of the residual stream."""
    q_rank: int
    """Channels of the queries' low rank (q_lora_rank)."""
    d_head: int = 128
    """Channels of a head without position, before they are absorbed into the latents' (qk_nope_head_dim)."""
    d_v: int = 128
    """Channels of a head's value (v_head_dim)."""
    rotary: str = "interleaved"
    """How attention pairs its rotary channels: "interleaved" or "half_split"."""
    index_rotary: str = "half_split"
    """How the indexer does: "half_split" (DeepSeek-V3.2) or "interleaved" (GLM-5)."""
    hadamard: bool = False
    """Whether the indexer's queries and keys are rotated by a Hadamard matrix before they are quantised."""
    power_of_two: bool = False
    """Whether scales are rounded up to powers of two (ue8m0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "q_rank", "d_head", "d_v"):
            self.require_range(name, 1, 1 << 20)
        self.require_in("rotary", STYLES)
        self.require_in("index_rotary", STYLES)
