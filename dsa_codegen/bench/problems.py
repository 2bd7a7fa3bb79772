"""Every stage by its name, and the time that no implementation of a case can beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UnknownName
from ..gpu import Gpu
from ..problem.op import Cost
from .chains import CHAINED
from .engines import ENGINES
from .grouped import GROUPED
from .models import MODELS
from .prologues import PROLOGUES
from .stage import Stage
from .stages import SINGLE
from .training import TRAINING

_STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (*PROLOGUES, *SINGLE, *GROUPED, *MODELS, *CHAINED, *ENGINES, *TRAINING)
}


def stage_of(name: str) -> Stage:
    """The stage of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in _STAGES:
        raise UnknownName("stage", name, _STAGES)
    return _STAGES[name]


@dataclass(frozen=True)
class Roofs:
    """Rates that a GPU was seen to reach: TFLOP/s of a large matrix product by unit, TB/s of a large copy."""

    tflops: Mapping[str, float]
    bandwidth: float

    @classmethod
    def of_datasheet(cls, gpu: Gpu) -> Roofs:
        """What the maker promises, where nothing was measured."""
        return cls({unit: gpu.rate(unit) for unit in ("fp8", "bf16", "fp32")}, gpu.bandwidth)

    def limit_us(self, costs: Sequence[Cost]) -> float:
        """The larger of the arithmetic's and the memory's time, in microseconds."""
        arithmetic = sum(cost.flops / self.tflops[cost.unit] for cost in costs) / 1e6
        return max(arithmetic, sum(cost.bytes for cost in costs) / self.bandwidth / 1e6)
