"""Dashboard: optuna-dashboard on the studies of past and present runs: every trial, its parameters and its time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage

from ..errors import DsaError, ToolMissing
from ..invocation import install
from .history import studies


class NoStudies(DsaError):
    """There is nothing to look at yet."""

    def __init__(self, state: Path) -> None:
        super().__init__(f"no journal of a search lies below {state}; run `tune` there first.")


def server() -> Any:
    """The package that shows studies.

    Raises:
        ToolMissing: it is not installed.
    """
    try:
        return importlib.import_module("optuna_dashboard")
    except ImportError as error:
        raise ToolMissing("optuna-dashboard", install("dashboard")) from error


def snapshot(state: Path) -> BaseStorage:
    """All studies below ``state`` in one storage, as they are now: each has a file of its own, the dashboard shows one.

    Raises:
        NoStudies: there are none.
    """
    storage = InMemoryStorage()
    copied = 0
    for path, study in studies(state):
        name = f"{path.parts[-3]} {study.study_name}"
        optuna.copy_study(from_study_name=study.study_name, from_storage=study._storage, to_storage=storage, to_study_name=name)
        copied += 1
    if not copied:
        raise NoStudies(state)
    return storage


def show(storage: BaseStorage, port: int) -> None:
    """Serve the dashboard on this machine alone until it is interrupted."""
    server().run_server(storage, host="127.0.0.1", port=port)
