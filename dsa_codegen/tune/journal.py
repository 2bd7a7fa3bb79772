"""Journal: the file that keeps a study's trials, and the identity under which they may be compared."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from ..problem.op import Case
from ..problem.values import bucket_to_json
from ..records.record import GpuKey
from .space import Space


@dataclass(frozen=True)
class Journal:
    """Where a study's trials lie, and what makes its outcomes comparable; a change of any of it is another study's."""

    path: Path
    digest: str
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, space: Space, case: Case, folder: Path, method: str) -> Journal:
        """The journal of a problem and backend below ``folder`` (``.tune/<gpu>``); nothing is created."""
        key = _identity(space, case, method)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return cls(folder / space.op.name / f"{space.backend}-{digest}.journal", digest, key)


def _identity(space: Space, case: Case, method: str) -> Mapping[str, Any]:
    return {
        "op": space.op.name,
        "backend": space.backend,
        "spec": space.spec.to_dict(),
        "bucket": bucket_to_json(case.sizes.bucket()),
        "case": case.id,
        "gpu": GpuKey.of(space.gpu).__dict__,
        "template": space.template,
        "choices": {parameter.name: list(parameter.choices) for parameter in space.table},
        "toolchain": dict(space.toolchain),
        "method": method,
    }


def open_study(path: Path, name: str) -> optuna.Study:
    """The study that the journal at ``path`` holds, or a new one; a journal that cannot be read is put aside.

    The caller keeps other processes away from it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # a killed process's; Optuna would wait 30 s for it
    _cut_off(path)
    try:
        return _create(path, name)
    except (ValueError, KeyError, TypeError) as error:  # json's errors are ValueErrors
        aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
        path.rename(aside)
        warnings.warn(f"{path} cannot be read ({error}); kept as {aside.name}, the study begins anew", stacklevel=2)
        return _create(path, name)


def read_study(path: Path) -> optuna.Study:
    """The study that a journal holds, to be looked at; whoever writes to it meanwhile is not disturbed.

    Raises:
        ValueError, KeyError, TypeError: it cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path)))
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage)


def _cut_off(path: Path) -> None:
    """Drop a last line without an end, which a killed process leaves: the next append would make it unreadable."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)


def _create(path: Path, name: str) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    sampler = optuna.samplers.RandomSampler()  # never asked: every trial is enqueued with all its parameters
    return optuna.create_study(
        storage=storage, sampler=sampler, pruner=optuna.pruners.NopPruner(), study_name=name, load_if_exists=True
    )
