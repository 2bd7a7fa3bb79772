"""History: what the journals of past searches tell, for whoever wants to see how a search found its way and what mattered."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .journal import read_study

_ROUNDING = 1e-12  # of squared logarithms: times that are equal
_LEAST_TRIALS = 8  # of fewer an importance would be chance


def histories(state: Path) -> dict[str, list[dict[str, Any]]]:
    """For every GPU below ``state`` (.tune) the studies that timed something, in their order.

    Each as ``{"name", "times_us", "importance"}``: the share of each parameter in how far times differ (its correlation ratio
    beside the others'), empty where too little was tried. A journal that cannot be read is passed over with a warning.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path, study in studies(state):
        history = _history(study)
        if history:
            found.setdefault(path.parts[-3], []).append(history)
    return found


def studies(state: Path) -> Iterator[tuple[Path, optuna.Study]]:
    """Every study below ``state`` with its journal; one that cannot be read is passed over with a warning."""
    for path in sorted(state.glob("*/*/*.journal")):
        try:
            yield path, read_study(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} cannot be read ({error})", stacklevel=2)


def _history(study: optuna.Study) -> dict[str, Any] | None:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    timed = [trial for trial in trials if trial.value]
    if not timed:
        return None
    name = study.study_name.rpartition(" ")[0] or study.study_name
    return {"name": name, "times_us": [trial.value for trial in timed], "importance": _importance(timed)}


def _importance(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Of each parameter the correlation ratio of the time's logarithm, in shares that add up to 1, the greatest first."""
    if len(trials) < _LEAST_TRIALS:
        return {}
    logs = [math.log(trial.value) for trial in trials if trial.value]
    mean = statistics.fmean(logs)
    found = {name: _between([trial.params.get(name) for trial in trials], logs, mean) for name in trials[0].params}
    total = sum(found.values())
    if total < _ROUNDING * len(logs):
        return {}
    return {name: round(part / total, 4) for name, part in sorted(found.items(), key=lambda pair: -pair[1])}


def _between(values: Sequence[Any], logs: Sequence[float], mean: float) -> float:
    """The sum of squares between the groups that share a value."""
    groups: dict[Any, list[float]] = {}
    for value, log in zip(values, logs, strict=True):
        groups.setdefault(value, []).append(log)
    return sum(len(group) * (statistics.fmean(group) - mean) ** 2 for group in groups.values())
