"""Cluster: the studies of a run as tasks on the hosts of a Ray cluster; every trial goes at once to the host that asked.

A task opens its study as any run does, but what it reads and writes of the journal goes through one actor on the asking host.
So a host that is lost costs the trials that it was at: Ray starts the task anew elsewhere, which goes on from the journal. The
finals of a problem are one task too, on one GPU; their records come back to be merged.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock

from .. import gpu as gpus
from ..errors import InputError, ToolMissing
from ..gpu import Gpu
from ..invocation import install
from ..kernels.backends import NAMES
from ..problem.op import Config
from . import ranking
from .evaluate import Evaluator
from .incumbent import Incumbent
from .journal import Journal
from .offline import ModelEvaluator
from .on_gpu import GpuEvaluator
from .pool import CompilePool
from .problem import Problem
from .results import Settled, contenders, settle
from .search import Search
from .shelf import Shelf, create
from .space import Space
from .study import Study

_RETRIES = 10  # of a task whose host or process was lost
_LOOK_S = 0.5
_REACH_S = 10.0


@dataclass(frozen=True)
class Workshop:
    """How a host judges candidates."""

    offline: bool = False
    processes: int | None = None
    """Compilers of a task; by default its share of the host's cores."""

    @property
    def gpus(self) -> float:
        """That a task takes of its host."""
        return 0.0 if self.offline else 1.0

    @contextmanager
    def open(self, gpu: Gpu) -> Iterator[Evaluator]:
        """An evaluator of this host.

        Raises:
            InputError: the host has another GPU than the one that is tuned for.
        """
        here = None if self.offline else gpus.detect()
        if not self.offline and (here is None or here.id != gpu.id):
            raise InputError("host", here.name if here else "one without a GPU", f"a host with {gpu.name}")
        with (
            tempfile.TemporaryDirectory(prefix="dsa-ray-") as folder,
            CompilePool(
                gpu,
                Path(folder),
                self.processes or _share(self.gpus),
                compile=ranking.compile,
                log=Path(folder) / "log",
                backends=NAMES,
            ) as pool,
            ModelEvaluator(pool) if self.offline else GpuEvaluator(pool, log=Path(folder) / "log") as evaluator,
        ):
            yield evaluator


Opens = Callable[[Gpu], AbstractContextManager[Evaluator]]


@dataclass(frozen=True)
class StudyTask:
    """What a host needs to search a study: plain values."""

    space: Space
    problem: Problem
    folder: Path
    method: str
    trials: int
    seeds: tuple[Config, ...]
    seed: int

    @classmethod
    def of(cls, study: Study, problem: Problem) -> StudyTask:
        """The same study elsewhere."""
        return cls(study.space, problem, study.folder, study.method, study.trials, study.seeds, study.seed)

    def open(self, shelf: Shelf) -> Study:
        """The study, on a shelf that leads to its journal."""
        return Study(
            self.space,
            self.problem.case,
            self.folder,
            method=self.method,
            trials=self.trials,
            seeds=self.seeds,
            seed=self.seed,
            shelf=shelf,
        )


class Keeper:
    """An actor on the asking host: the one that writes journals."""

    def read(self, path: str, since: int) -> list[dict[str, Any]]:
        """The entries of a journal from a number on."""
        return list(_file(path).read_logs(since))

    def append(self, path: str, logs: list[dict[str, Any]]) -> None:
        """Add entries."""
        _file(path).append_logs(logs)


def _file(path: str) -> JournalFileBackend:
    return JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))


class Relayed(BaseJournalBackend):
    """A journal that lies with the keeper."""

    def __init__(self, keeper: Any, path: Path) -> None:
        self._keeper, self._path = keeper, str(path)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return _ray().get(self._keeper.read.remote(self._path, log_number_from))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        _ray().get(self._keeper.append.remote(self._path, logs))


class Relay(Shelf):
    """The asking host's journals, from any other; that host holds their locks."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def lock(self, journal: Journal) -> filelock.BaseFileLock:
        return filelock.SoftFileLock(journal.path)  # never acquired

    def open(self, journal: Journal, name: str) -> optuna.Study:
        return create(JournalStorage(Relayed(self._keeper, journal.path)), name)

    def forget(self, journal: Journal, name: str) -> None:
        """The asking host has, where that was wanted."""


def search_study(task: StudyTask, keeper: Any, opens: Opens, until: float) -> str:
    """A host's job: search until a time of ``time.time()``; returns why the problem cannot be set up, or nothing."""
    study = task.open(Relay(keeper))
    try:
        with opens(task.problem.gpu) as evaluator:
            Search({study: task.problem}, evaluator, lambda: None).run(time.monotonic() + until - time.time())
    finally:
        study.close()
    return study.failure


def settle_problem(
    tasks: Sequence[StudyTask], keeper: Any, opens: Opens, default: Config, serving: Mapping[str, Incumbent], limit_s: float
) -> list[Settled]:
    """A host's job: build the fastest of a problem's studies again, hold the final, and check the winners."""
    problem, studies = tasks[0].problem, [task.open(Relay(keeper)) for task in tasks]
    try:
        with opens(problem.gpu) as evaluator:
            if evaluator.measures:
                evaluator.finish_builds([each.candidate for each in contenders(studies, default, serving)])
            return settle(problem, studies, default, evaluator, seed=tasks[0].seed, limit_s=limit_s, serving=serving)
    finally:
        for study in studies:
            study.close()


class Cluster:
    """A connection to a Ray cluster, from one of its hosts.

    Args:
        address: ``host:port`` of its head, or "auto" for the cluster that this host belongs to.

    Raises:
        ToolMissing: Ray is not installed.
        InputError: there is no cluster at that address.
    """

    def __init__(self, address: str, opens: Opens | None = None, share: Mapping[str, float] | None = None) -> None:
        ray = _ray()
        try:
            _reach(address)
            paths = os.pathsep.join(filter(None, sys.path))
            ray.init(
                address=address, runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, logging_level="ERROR"
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError("ray", address, f"the address of a Ray cluster that this host belongs to ({error})") from error
        self.offline = opens is None and not ray.cluster_resources().get("GPU")
        workshop = Workshop(self.offline)
        self._opens: Opens = opens or workshop.open
        share = share or {"num_gpus": workshop.gpus, "num_cpus": 1.0}
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._keeper = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=here, max_concurrency=1).remote()
        options = {**share, "max_retries": _RETRIES, "scheduling_strategy": "SPREAD"}
        self._search = ray.remote(search_study).options(**options)
        self._settle = ray.remote(settle_problem).options(**options)
        self._detect = ray.remote(gpus.detect).options(**share)

    def detect(self) -> Gpu | None:
        """The GPU of one of the hosts that have any."""
        return None if self.offline else _ray().get(self._detect.remote())

    def search(self, studies: Mapping[Study, Problem], until: float, tell: Callable[[], None]) -> None:
        """Search all studies until a time of ``time.time()``; what the hosts find is seen here as it comes."""
        tasks = {study: StudyTask.of(study, problem) for study, problem in studies.items() if not study.exhausted}
        refs = {self._search.remote(task, self._keeper, self._opens, until): study for study, task in tasks.items()}

        def take(study: Study, failure: str) -> None:
            study.failure = study.failure or failure

        self._gather(refs, take, lambda: _catch_up(studies, tell))

    def settle(
        self,
        wanted: Sequence[tuple[Problem, Sequence[Study], Config, Mapping[str, Incumbent]]],
        limit_s: float,
        take: Callable[[Problem, list[Settled]], None],
        tell: Callable[[], None],
    ) -> None:
        """The finals of all problems, each on one host."""
        refs = {}
        for problem, studies, default, serving in wanted:
            tasks = [StudyTask.of(study, problem) for study in studies]
            refs[self._settle.remote(tasks, self._keeper, self._opens, default, serving, limit_s)] = problem
        self._gather(refs, take, tell)

    def close(self) -> None:
        """Leave the cluster."""
        _ray().shutdown()

    def _gather(self, refs: dict[Any, Any], take: Callable[[Any, Any], None], look: Callable[[], None]) -> None:
        """Take what comes as it comes; whatever is under way is ended where this is."""
        ray, waiting = _ray(), dict(refs)
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=_LOOK_S)
                look()
                for ref in done:
                    take(waiting.pop(ref), ray.get(ref))
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)
        look()


def _reach(address: str) -> None:
    """Raise OSError or ValueError where nobody listens at ``host:port``: Ray itself would try for minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


def _catch_up(studies: Iterable[Study], tell: Callable[[], None]) -> None:
    for study in studies:
        study.catch_up()
    tell()


def _share(gpus_taken: float) -> int:
    """The host's cores for each of its GPUs; where none is taken one, as there is a task for every core."""
    cores = len(os.sched_getaffinity(0))
    found = _ray().nodes()
    own = _ray().get_runtime_context().get_node_id()
    there = next((node["Resources"].get("GPU", 1.0) for node in found if node["NodeID"] == own), 1.0)
    return max(1, int(cores / max(there, 1.0)) - 1) if gpus_taken else 1


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ToolMissing("ray", install("ray")) from error
    return ray
