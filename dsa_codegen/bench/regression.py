"""Regression: the speed test: a fresh short run beside the committed rows, each case against the same peer as there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import RecordError
from ..invocation import command
from .campaign import Campaign
from .cases import BenchCase, all_cases, chosen, headlines_first
from .comparison import Comparison, against
from .report import labels
from .results import Row, key_of


def short(committed: Sequence[Row], stages: Sequence[str] = ()) -> list[BenchCase]:
    """The headline of every stage that has a ratio there, and the case that is furthest behind.

    Raises:
        RecordError: there is none.
    """
    heads = {each.key for each in chosen(stages, per_stage=1)}
    keys = {key_of(row) for row in committed if row["ratio"]} & heads
    for stage, rows in labels.by_stage([row for row in committed if row["ratio"]]).items():
        worst = labels.worst(rows)
        if worst is not None and (not stages or stage in stages):
            keys.add(key_of(worst))
    return known(keys)


def known(keys: Iterable[object], of: Iterable[BenchCase] | None = None) -> list[BenchCase]:
    """The cases of some keys, by default of those that are listed, the headlines first.

    Raises:
        RecordError: there is none.
    """
    wanted = set(keys)
    found = headlines_first(each for each in (all_cases() if of is None else of) if each.key in wanted)
    if not found:
        raise RecordError(f"no committed result to compare with; {command()} bench --against all makes some")
    return found


def run(campaign: Campaign, committed: Sequence[Row], cases: Sequence[BenchCase]) -> Comparison:
    """Hold the cases; what seems to have fallen is held once more, and only what falls twice has fallen."""
    fresh = campaign.run(cases)
    fallen = {pair.key for pair in against(committed, fresh).fallen}
    if fallen:
        again = campaign.run([each for each in cases if each.key in fallen], rebuild=False)
        held = {key_of(row): row for row in (*fresh, *again)}
        fresh = list(held.values())
    return against(committed, fresh)
