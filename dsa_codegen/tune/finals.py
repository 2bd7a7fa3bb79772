"""Finals: which of the fastest candidates becomes the record; noise must not decide, and the default must not lose to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..problem.op import Config
from ..proof.timing import TIE, Timing

TIE_MODELLED = 0.25  # the model is no better than that: a default that somebody measured is not given up for less
_MAD_OF_SPREAD = 0.4  # for normal noise the median absolute deviation is 0.40 of the distance from p20 to p80


def mad_us(timing: Timing) -> float:
    """Median absolute deviation of a timing's samples, estimated from the percentiles."""
    return _MAD_OF_SPREAD * (timing.p80 - timing.p20)


@dataclass(frozen=True)
class Finalist:
    """A candidate with the time it took in the final, in which all took turns."""

    config: Config
    timing: Timing
    smem: int
    default: bool = False
    standing: bool = False
    """Whether a record of it serves today."""

    @property
    def mad_us(self) -> float:
        """Median absolute deviation of its samples, estimated from the percentiles."""
        return mad_us(self.timing)


def tied(finalists: Sequence[Finalist]) -> list[Finalist]:
    """Those that noise cannot tell from the fastest: within 1 % or two median absolute deviations of it.

    Modelled times are no closer than 25 %.
    """
    best = min(finalists, key=lambda each: each.timing.median)
    tie = TIE if best.timing.n else TIE_MODELLED
    band = max(tie * best.timing.median, 2 * best.mad_us)
    return [each for each in finalists if each.timing.median <= best.timing.median + band]


def choose(finalists: Sequence[Finalist]) -> Finalist:
    """The winner: of the tied the default, else what is recorded, else fewest shared memory, fewest stages, the first by name.

    Where times are modelled a tie says little, and the fastest is taken unless that would give up the default.
    """
    equals = tied(finalists)
    if not any(each.default or each.timing.n for each in equals):
        equals = [min(finalists, key=lambda each: each.timing.median)]
    return min(
        equals, key=lambda each: (not each.default, not each.standing, each.smem, _stages(each.config), _values(each.config))
    )


def _stages(config: Config) -> int:
    stages = config.to_dict().get("num_stages", 0)
    return stages if isinstance(stages, int) else 0


def _values(config: Config) -> tuple[tuple[str, str, object], ...]:
    return tuple((name, type(value).__name__, value) for name, value in config.values)
