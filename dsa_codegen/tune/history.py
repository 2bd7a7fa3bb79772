"""History: what the journals of past searches tell, for whoever wants to see how a search found its way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState


def histories(state: Path) -> dict[str, list[dict[str, Any]]]:
    """For every GPU below ``state`` (.tune) the studies that timed something: ``{"name", "times_us"}``, in their order.

    A journal that cannot be read is passed over with a warning.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(state.glob("*/*/*.journal")):
        try:
            studies = optuna.get_all_study_summaries(_storage(path))
            loaded = [optuna.load_study(study_name=each.study_name, storage=_storage(path)) for each in studies]
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} cannot be read ({error})", stacklevel=2)
            continue
        gpu_id = path.parts[-3]
        found.setdefault(gpu_id, []).extend(filter(None, map(_history, loaded)))
    return {gpu_id: each for gpu_id, each in found.items() if each}


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def _history(study: optuna.Study) -> dict[str, Any] | None:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    times = [trial.value for trial in trials if trial.value is not None]
    return {"name": study.study_name.rpartition(" ")[0] or study.study_name, "times_us": times} if times else None
