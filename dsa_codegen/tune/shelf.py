"""Shelf: where the trials of studies are kept: in files of this machine, in a database that several share, or in memory."""

from __future__ import annotations

import functools
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import filelock
import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from ..errors import InputError
from .journal import Journal
from .lock import take


class Shelf(ABC):
    """Keeps studies by the digests of their journals."""

    shared: bool = False
    """Whether other machines may search the same study at the same time."""

    def lock(self, journal: Journal) -> filelock.BaseFileLock:
        """Keep other processes with the same folder away.

        Raises:
            StudyBusy: one has it.
        """
        return take(journal.path)

    @abstractmethod
    def open(self, journal: Journal, name: str) -> optuna.Study:
        """The study of that name, or a new one."""

    @abstractmethod
    def forget(self, journal: Journal, name: str) -> None:
        """Drop the study of that name, where there is one."""


class Files(Shelf):
    """One file a study, which every finished trial is appended to; the caller keeps other processes away."""

    def open(self, journal: Journal, name: str) -> optuna.Study:
        """As said; a file that cannot be read is put aside."""
        path = journal.path
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # a killed process's; Optuna would wait 30 s for it
        _cut_off(path)
        try:
            return create(_journal(path), name)
        except (ValueError, KeyError, TypeError) as error:  # json's errors are ValueErrors
            aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
            path.rename(aside)
            warnings.warn(f"{path} cannot be read ({error}); kept as {aside.name}, the study begins anew", stacklevel=2)
            return create(_journal(path), name)

    def forget(self, journal: Journal, name: str) -> None:
        journal.path.unlink(missing_ok=True)


class Memory(Shelf):
    """Nothing is kept; for replays."""

    def lock(self, journal: Journal) -> filelock.BaseFileLock:
        return filelock.SoftFileLock(journal.path)  # never acquired

    def open(self, journal: Journal, name: str) -> optuna.Study:
        return create(InMemoryStorage(), name)

    def forget(self, journal: Journal, name: str) -> None:
        """There is nothing."""


class Database(Shelf):
    """What SQLAlchemy reaches by a URL: trials of several machines meet there, and each takes over what others find.

    Args:
        url: ``postgresql://user:password@host/name``, ``mysql+pymysql://…``, ``sqlite:///path``.

    Raises:
        InputError: there is no driver for it, or it cannot be reached.
    """

    shared = True

    def __init__(self, url: str) -> None:
        self._storage = _database(url)

    def open(self, journal: Journal, name: str) -> optuna.Study:
        return create(self._storage, name)

    def forget(self, journal: Journal, name: str) -> None:
        if name in {summary.study_name for summary in optuna.get_all_study_summaries(self._storage, include_best_trial=False)}:
            optuna.delete_study(study_name=name, storage=self._storage)


def create(storage: BaseStorage, name: str) -> optuna.Study:
    """The study of that name in a storage, or a new one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.RandomSampler()  # never asked: every trial is enqueued with all its parameters
    return optuna.create_study(
        storage=storage, sampler=sampler, pruner=optuna.pruners.NopPruner(), study_name=name, load_if_exists=True
    )


def begin(study: optuna.Study, params: Mapping[str, int], ranges: Mapping[str, int]) -> optuna.Trial:
    """A trial of these parameters, of 0 to ``ranges`` each, that is under way.

    It is noted by one line of a journal, where asking for an enqueued trial and drawing its parameters writes eight and waits
    for the disk after each; whoever deals out candidates to several GPUs has no time for that.
    """
    distributions = {name: optuna.distributions.IntDistribution(0, high) for name, high in ranges.items()}
    running = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, params=dict(params), distributions=dict(distributions)
    )
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id, template_trial=running))


@functools.lru_cache(maxsize=4)
def _database(url: str) -> RDBStorage:
    import sqlalchemy.exc

    try:
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError as error:
        raise InputError(
            "storage", "(no URL)", "dialect://user:password@host/name, such as postgresql://… or sqlite:///…"
        ) from error
    try:
        return RDBStorage(url)
    except (ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError("storage", shown, f"a database that can be reached, with its driver installed ({reason})") from error


def _journal(path: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def _cut_off(path: Path) -> None:
    """Drop a last line without an end, which a killed process leaves: the next append would make it unreadable."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
