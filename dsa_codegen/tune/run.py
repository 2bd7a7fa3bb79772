"""Run: tunes every operation, size bucket and backend of a model, and writes a record as soon as a problem is settled.

Whatever happens, nothing found is lost: outcomes lie in the studies' journals, records of settled problems in ``tuned/``,
and an interrupted run writes what it has for the others. The next run goes on from there.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import paths, records
from ..build import Built
from ..errors import DsaError, NoConfig
from ..explain import nearest
from ..gpu import Gpu
from ..lookup import missing_tool, search_path
from ..op import Config, Op
from ..record import Record
from ..values import Spec
from .evaluate import Evaluator
from .jobs import Problem
from .offline import ModelEvaluator
from .on_gpu import GpuEvaluator
from .outcome import Kind
from .plan import Budget, Report, problems
from .pool import CompilePool
from .progress import Notify, Progress, StudyStatus
from .results import contenders, settle
from .search import Search
from .session import Session
from .space import Space
from .study import Study

STATE = Path(".tune")
_FINAL_SECONDS = 2.0  # of device time for a problem's final, at most; less where the budget is nearly spent
_NEIGHBOURS = 3  # tuned configs of near problems that a search begins with


def tune(
    wanted: Sequence[tuple[Op, Spec]],
    gpu: Gpu,
    folder: Path,
    *,
    budget: Budget = Budget.DEFAULT,
    offline: bool = False,
    backends: Sequence[str] = (),
    processes: int | None = None,
    seed: int = 0,
    state: Path = STATE,
    fresh: bool = False,
    notify: Notify = lambda progress: None,
) -> Report:
    """Tune; go on where an earlier run with the same ``state`` left off.

    Args:
        folder: the records are merged into ``<folder>/<gpu>/<op>.json``.
        offline: rank compiled candidates by the model, without a GPU; records say "modelled".
        backends: only these; all by default.
        processes: compilers that run at once; by default the cores this process may use.
        fresh: forget what earlier runs found.
        notify: called with the progress several times a second.

    Raises:
        StudyBusy: another process is tuning the same.
        RecordError: a file of records there cannot be read; nothing is started.
    """
    run = _Run(wanted, gpu, folder, budget, backends, seed, state / gpu.id, notify)
    cores = processes or _cores(offline)
    if fresh:
        shutil.rmtree(run.state, ignore_errors=True)
    with CompilePool(gpu, run.state / "builds", cores) as pool:
        if offline:
            return run.go(ModelEvaluator(pool))
        with GpuEvaluator(pool) as evaluator:
            return run.go(evaluator)


def _cores(offline: bool) -> int:
    available = len(os.sched_getaffinity(0))
    return available if offline else max(1, available - 2)  # this process and the one that times need theirs


@dataclass
class _Run:
    wanted: Sequence[tuple[Op, Spec]]
    gpu: Gpu
    folder: Path
    budget: Budget
    backends: Sequence[str]
    seed: int
    state: Path
    notify: Notify
    notes: list[str] = field(default_factory=list)
    studies: dict[Study, Problem] = field(default_factory=dict)
    defaults: dict[str, Config] = field(default_factory=dict)
    written: dict[str, list[Record]] = field(default_factory=dict)
    phase: str = "search"

    def go(self, evaluator: Evaluator) -> Report:
        """The whole run."""
        for op, _ in self.wanted:
            records.require_readable(records.path_of(self.folder, self.gpu.id, op.name))
        self.state.mkdir(parents=True, exist_ok=True)
        interrupted = False
        try:
            self._open_studies(evaluator.method)
            aim = [study.path.name for study in self.studies]
            self.session = Session(self.state, aim, self.budget.wall_s)
            try:
                Search(self.studies, evaluator, self._tell).run(self.session.deadline(evaluator.search_share))
                self._finals(evaluator)
                self.session.finish()
            except KeyboardInterrupt:
                interrupted = True
                self._salvage(evaluator)
            statuses = tuple(map(self._status, self.studies))
            self.notes += filter(None, map(_complaint, self.studies))
        finally:
            for study in self.studies:
                study.close()
        if not interrupted:
            shutil.rmtree(self.state / "builds", ignore_errors=True)
        found = tuple(record for each in self.written.values() for record in each)
        files = dict.fromkeys(records.path_of(self.folder, record.gpu.id, record.op) for record in found)
        return Report(found, tuple(files), statuses, tuple(self.notes), interrupted, self.session.elapsed_s)

    def _open_studies(self, method: str) -> None:
        for problem in problems(self.wanted, self.gpu):
            op, spec, case = problem.op, problem.spec, problem.case
            if self.gpu.capability < op.min_capability:
                self._note(f"{op.name}: needs sm_{op.min_capability} or newer, {self.gpu.name} is sm_{self.gpu.capability}")
                continue
            try:
                default = op.default_config(spec, case.sizes, self.gpu)
            except NoConfig as error:
                self._note(str(error))
                continue
            self.defaults[problem.id] = default
            for backend in op.backends:
                if not self.backends or backend in self.backends:
                    self._open_study(problem, backend, default, method)

    def _open_study(self, problem: Problem, backend: str, default: Config, method: str) -> None:
        lacking = missing_tool(backend)
        if lacking:
            self._note(f"{problem.op.name}: left out {lacking}")
            return
        space = Space(problem.op, problem.spec, backend, self.gpu)
        try:
            first = default if default.backend == backend else space.closest(default)
        except NoConfig as error:
            self._note(str(error))
            return
        seeds = [first, *self._neighbours(problem, backend)]
        study = Study(space, problem.case, self.state, method=method, trials=self.budget.trials, seeds=seeds, seed=self.seed)
        self.studies[study] = problem

    def _neighbours(self, problem: Problem, backend: str) -> list[Config]:
        """Configs of the nearest records that this operation still accepts."""
        folders = {*search_path().values(), self.folder}
        known = [record for folder in sorted(folders) for record in records.read_all(folder, problem.op.name)]
        known = [record for record in known if record.backend == backend and _accepted(record, problem.op)]
        near = nearest(known, problem.spec, problem.case.sizes, self.gpu, _NEIGHBOURS)
        return [record.config_for(problem.op) for record in near]

    def _finals(self, evaluator: Evaluator) -> None:
        self.phase = "finals"
        open_problems = self._open_problems()
        if evaluator.measures:
            self._rebuild(evaluator, open_problems)
        for number, (problem, studies) in enumerate(open_problems):
            left_s = self.session.deadline(1.0) - time.monotonic()
            limit_s = min(_FINAL_SECONDS, max(0.2, left_s / (2 * (len(open_problems) - number))))
            settled = settle(problem, studies, self.defaults[problem.id], evaluator, seed=self.seed, limit_s=limit_s)
            if evaluator.measures:
                for _, candidate in settled:
                    _keep(evaluator.built(candidate))
            self._write(problem, [record for record, _ in settled])
            self._tell()
        self.phase = "done"
        self._tell()

    def _rebuild(self, evaluator: Evaluator, open_problems: Sequence[tuple[Problem, list[Study]]]) -> None:
        """Candidates of an earlier run may have to be compiled again before they can run."""
        for problem, studies in open_problems:
            for each in contenders(studies, self.defaults[problem.id]):
                evaluator.pool.request(each.candidate.rendered)
        while evaluator.pool.backlog:
            evaluator.pool.poll()
            self._tell()
            time.sleep(0.02)

    def _salvage(self, evaluator: Evaluator) -> None:
        """Interrupted: write what the search has measured, without a final."""
        evaluator.cancel()
        for problem, studies in self._open_problems():
            settled = settle(problem, studies, self.defaults[problem.id], None, seed=self.seed)
            self._write(problem, [record for record, _ in settled])

    def _open_problems(self) -> list[tuple[Problem, list[Study]]]:
        by_id: dict[str, tuple[Problem, list[Study]]] = {}
        for study, problem in self.studies.items():
            by_id.setdefault(problem.id, (problem, []))[1].append(study)
        return [pair for key, pair in by_id.items() if key not in self.written]

    def _write(self, problem: Problem, fresh: list[Record]) -> None:
        self.written[problem.id] = fresh
        records.merge(self.folder, fresh)

    def _tell(self) -> None:
        self.session.save()
        count = len(dict.fromkeys(problem.id for problem in self.studies.values()))
        statuses = tuple(map(self._status, self.studies))
        session = self.session
        self.notify(Progress(self.phase, session.elapsed_s, session.budget_s, statuses, len(self.written), count))

    def _status(self, study: Study) -> StudyStatus:
        default = self.defaults[self.studies[study].id]
        known = study.outcome_of(default)
        default_us = known[1].time_us if known and known[1].ok else None
        best_us = study.best.time_us if study.best else None
        counts = dict(study.counts)
        return StudyStatus(study.label, len(study.seen), study.trials, best_us, default_us, counts, study.exhausted)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _accepted(record: Record, op: Op) -> bool:
    try:
        record.config_for(op)
    except DsaError:
        return False
    return True


def _complaint(study: Study) -> str:
    """A line for a study most of whose candidates failed in one way; a broken path must not hide behind a healthy one."""
    if study.failure:
        return f"{study.label}: {study.failure}"
    for kind, message in study.first_failure.items():
        if kind is not Kind.OK and 2 * study.counts[kind] > len(study.seen):
            return f"{study.label}: {study.counts[kind]} of {len(study.seen)} candidates: {kind.value}; the first: {message}"
    return ""


def _keep(built: Built) -> None:
    """Copy a winner's build from the run's cache to the user's: the first call that needs it need not compile."""
    target = paths.cache() / built.folder.name
    if target.exists():
        return
    staging = target.with_name(f".staging-{uuid.uuid4().hex}")
    try:
        shutil.copytree(built.folder, staging)
        staging.rename(target)
    except OSError:  # another process was first, or the cache cannot be written: it is compiled when it is needed
        shutil.rmtree(staging, ignore_errors=True)
