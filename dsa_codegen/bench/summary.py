"""Summary: what a row of results says of a contest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..proof.timing import Timing
from . import results
from .cases import BenchCase
from .contest import OURS, Entry, Outcome
from .problems import Roofs, stage_of


def summarise(case: BenchCase, outcome: Outcome, roofs: Roofs) -> dict[str, Any]:
    """The fields of a row between its problem and its date.

    Beyond the plain figures: spreads, warm times, the peers' similarities, and a note for whoever has no time (missing,
    crashed, disagrees).
    """
    costs = stage_of(case.stage).costs(case)
    ours = next((entry for entry in outcome.entries if entry.name == OURS), Entry(OURS, note="not run"))
    others = [entry for entry in outcome.entries if entry.name != OURS]
    times = {entry.name: _us(entry.timing) for entry in others if entry.timing}
    best = min(times, key=lambda name: times[name], default=None)
    ours_us = _us(ours.timing) if ours.timing else None
    return {
        "ours_us": ours_us,
        "ours_variant": outcome.variant,
        "peers": times,
        "peer_facts": {entry.name: entry.facts for entry in others if entry.timing and entry.facts},
        "best_peer": best,
        "ratio": round(times[best] / ours_us, 4) if best is not None and ours_us else None,
        "limit_us": round(roofs.limit_us(costs), 3),
        "similarity": ours.similarity,
        "spread_us": {entry.name: _spread(entry.timing) for entry in outcome.entries if entry.timing},
        "warm_us": {entry.name: _us(entry.warm) for entry in outcome.entries if entry.warm},
        "peer_similarity": {entry.name: entry.similarity for entry in others if entry.similarity is not None},
        "notes": {entry.name: entry.note for entry in outcome.entries if entry.note},
        "flops": sum(cost.flops for cost in costs),
        "bytes": sum(cost.bytes for cost in costs),
        "unit": _unit(case),
        "sets": outcome.sets,
        "cold": outcome.cold,
        "turns": results.SETTLED if outcome.settled else results.MIXED,
        "suite": case.suite,
        "wall_s": outcome.wall_s,
    }


def failure(case: BenchCase, reasons: Mapping[str, str], roofs: Roofs) -> dict[str, Any]:
    """The same of a contest that did not come about."""
    return summarise(case, Outcome(tuple(Entry(name, note=reason) for name, reason in reasons.items())), roofs)


def _unit(case: BenchCase) -> str:
    """The arithmetic that dominates, by which a row stands under one of the roofs."""
    costs = stage_of(case.stage).costs(case)
    return max(costs, key=lambda cost: cost.flops).unit


def _us(timing: Timing) -> float:
    return round(timing.median, 3)


def _spread(timing: Timing) -> Sequence[float]:
    return [round(timing.p20, 3), round(timing.p80, 3)]
