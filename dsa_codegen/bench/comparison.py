"""Comparison: whether two runs of the benchmark tell the same story: their ratios beside each other, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecordError
from . import results
from .report import labels
from .results import Row

LIMIT = 0.05
"""What two runs' ratios may differ by."""


@dataclass(frozen=True)
class Pair:
    """One case in both runs."""

    stage: str
    shape: str
    first: float
    second: float
    """Ratios."""
    why: str = ""
    """Whose time moved most, and from what to what."""
    key: tuple[Any, ...] = ()
    """The case's."""
    turns: tuple[str, str] = ("", "")
    """How contestants took turns in either."""

    @property
    def difference(self) -> float:
        """Of the second ratio from the first, as a share of the first."""
        return self.second / self.first - 1


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        pairs: the cases that have a ratio in both, the largest difference first.
        alone: cases with a ratio in one of them only.
    """

    pairs: Sequence[Pair]
    alone: Sequence[str]
    limit: float = LIMIT

    @property
    def outside(self) -> list[Pair]:
        """Those that differ by more than the limit."""
        return [pair for pair in self.pairs if abs(pair.difference) > self.limit]

    @property
    def fallen(self) -> list[Pair]:
        """Those whose second ratio is lower by more than the limit."""
        return [pair for pair in self.pairs if pair.difference < -self.limit]

    @property
    def unlike(self) -> dict[tuple[str, str], int]:
        """How many were timed in different ways, by these: at the power limit that alone makes a difference."""
        return dict(Counter(pair.turns for pair in self.pairs if pair.turns[0] != pair.turns[1]))


def rows_of(path: Path, gpu_id: str = "") -> list[Row]:
    """The rows of a file of results, or of the folder that a benchmark wrote to: there those of the GPU with the newest ones.

    Args:
        gpu_id: those of this GPU instead.

    Raises:
        RecordError: there are none, or they cannot be read.
    """
    file = results.rows_path(path, gpu_id or results.latest_gpu(path)) if path.is_dir() else path
    rows = results.read_rows(file)
    if not rows:
        raise RecordError(f"there are no results in {file}")
    return rows


def compare(first: Sequence[Row], second: Sequence[Row], limit: float = LIMIT) -> Comparison:
    """Pair the rows of the same problems."""
    ones, twos = ({results.key_of(row): row for row in rows} for rows in (first, second))
    both = [(ones[key], twos[key]) for key in ones if key in twos and ones[key]["ratio"] and twos[key]["ratio"]]
    pairs = [_pair(one, two, one["ratio"], two["ratio"], _moved(one, two)) for one, two in both]
    paired = {results.key_of(one) for one, _ in both}
    single = [row for rows in (ones, twos) for key, row in rows.items() if key not in paired and row["ratio"]]
    alone = [f"{row['stage']}: {labels.shape(row)} ({row['commit']}, {row['date']})" for row in single]
    return Comparison(sorted(pairs, key=lambda pair: -abs(pair.difference)), alone, limit)


def against(committed: Sequence[Row], fresh: Sequence[Row], limit: float = LIMIT) -> Comparison:
    """Pair fresh rows with the committed ones of the same problems, both against the committed row's best peer.

    Where ours has no time any more its ratio is 0; where that peer has none there is nothing to compare.
    """
    before = {results.key_of(row): row for row in committed if row["ratio"]}
    pairs, alone = [], []
    for row in fresh:
        one = before.get(results.key_of(row))
        if one is None:
            continue
        peer_us = row["peers"].get(one["best_peer"])
        if row["ours_us"] and not peer_us:
            alone.append(f"{row['stage']}: {labels.shape(row)}: no time of {one['best_peer']}")
            continue
        ratio = peer_us / row["ours_us"] if peer_us and row["ours_us"] else 0.0
        why = _moved(one, row) if row["ours_us"] else row["notes"].get("ours", "ours has no time")
        pairs.append(_pair(one, row, one["ratio"], ratio, why))
    return Comparison(sorted(pairs, key=lambda pair: pair.difference), alone, limit)


def _pair(one: Row, two: Row, first: float, second: float, why: str) -> Pair:
    turns = results.turns_of(one), results.turns_of(two)
    return Pair(labels.TITLES[two["stage"]], labels.shape(two), first, second, why, results.key_of(two), turns)


def _moved(one: Row, two: Row) -> str:
    """The contestant whose time changed by the largest share."""
    after_us = {"ours": two["ours_us"], **two["peers"]}
    times = [(name, us, after_us[name]) for name, us in _times(one).items() if name in after_us]
    name, before, after = max(times, key=lambda each: abs(each[2] / each[1] - 1))
    return f"{name} {before:.4g} → {after:.4g}"


def _times(row: Mapping[str, Any]) -> dict[str, float]:
    """Ours and the best peer's."""
    return {"ours": row["ours_us"], row["best_peer"]: row["peers"][row["best_peer"]]}
