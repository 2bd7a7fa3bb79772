"""Journal: the identity under which a study's trials may be compared, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

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


def read_study(path: Path) -> optuna.Study:
    """The study that a journal holds, to be looked at; whoever writes to it meanwhile is not disturbed.

    Raises:
        ValueError, KeyError, TypeError: it cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path)))
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage)
