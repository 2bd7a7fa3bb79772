"""Run: tunes every operation, size bucket and backend of a model, and writes a record as soon as a problem is settled.

Whatever happens, nothing found is lost: outcomes lie in the studies' journals, records of settled problems in ``tuned/``,
and an interrupted run writes what it has for the others. The next run goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, NoConfig
from ..gpu import Gpu
from ..problem.op import Op
from ..problem.values import Spec
from ..records import files as records
from ..records.lookup import lookup, search_path
from ..records.record import GpuKey, Record
from . import ranking
from .account import Account
from .cluster import Cluster
from .effort import NORMAL, Effort, most_needed
from .evaluate import Evaluator
from .incumbent import Change
from .keep import keep
from .ledger import Ledger
from .lock import IMPATIENT, Patience
from .offline import ModelEvaluator
from .on_gpu import GpuEvaluator
from .opening import Opened, Opener
from .outcome import Kind
from .plan import STATE, Budget, Failure, Missing, Report, check, problems
from .pool import CompilePool, cores
from .problem import Problem
from .progress import Notify, Progress, StudyStatus
from .results import Settled, contenders, settle
from .search import Search
from .shelf import Database
from .study import FILES, Study

_FINAL_SECONDS = 2.0  # of device time for a problem's final, at most; less where the budget is nearly spent


def tune(
    wanted: Sequence[tuple[Op, Spec]],
    gpu: Gpu,
    folder: Path,
    *,
    budget: Budget | None = None,
    effort: Effort = NORMAL,
    offline: bool = False,
    backends: Sequence[str] = (),
    processes: int | None = None,
    seed: int = 0,
    state: Path = STATE,
    fresh: bool = False,
    missing: bool = False,
    devices: Sequence[str] = ("",),
    patience: Patience = IMPATIENT,
    storage: str = "",
    cluster: Cluster | None = None,
    notify: Notify = lambda progress: None,
) -> Report:
    """Tune; go on where an earlier run with the same ``state`` left off.

    Args:
        budget: by default the effort's.
        effort: of ``effort.EFFORTS``; a quick one searches only what the model needs most.
        folder: the records are merged into ``<folder>/<gpu>/<op>.json``.
        offline: rank compiled candidates by the model, without a GPU; records say "modelled".
        backends: only these; by default all, offline the one that each operation prefers.
        processes: compilers that run at once; by default the cores this process may use.
        fresh: forget what earlier runs found.
        missing: search only the calls that no measured record of their own serves.
        devices: GPUs that candidates are dealt out to, as ``CUDA_VISIBLE_DEVICES`` calls them (``gpu.alike``); finals are
            held on the first. By default the current device alone.
        patience: with other runs that use the same studies; what they find, this one goes on from.
        storage: the URL of a database that keeps the trials, for several machines; by default files below ``state`` do.
        cluster: whose hosts search the studies and hold the finals; this one keeps journals and records.
        notify: called with the progress several times a second.

    Raises:
        StudyBusy: another process is tuning the same, and patience came to its end.
        RecordError: a file of records there cannot be read; nothing is started.
        InputError, UnknownName: an argument is out of its range, or a folder cannot be written; nothing is touched.
    """
    budget = budget or effort.budget(offline)
    check(budget, seed, processes, backends, folder, state)
    if storage and cluster:
        raise InputError("storage", "a database", "files of this host, which a cluster's hosts reach through it")
    chosen, notes, aim = _aim(problems(wanted, gpu), folder, effort, missing)
    names = [*aim, *backends, "offline" if offline else "gpu", *_named(effort, missing)]
    ledger = Ledger(state / gpu.id, names, budget.wall_s, patience)
    size, here = _processes(processes, offline, devices, cluster), () if cluster else devices
    with ledger, _compilers(wanted, gpu, ledger, backends, size) as pool, _judge(pool, ledger, offline, here) as evaluator:
        opener = Opener(
            folder=ledger.folder,
            tuned=folder,
            method=evaluator.method,
            measures=evaluator.measures,
            trials=budget.trials,
            seed=seed,
            fresh=fresh,
            backends=backends,
            patience=patience,
            shelf=Database(storage) if storage else FILES,
            narrow=effort.narrow,
        )
        return _Run(folder, opener, ledger, notify, Opened(notes=notes), cluster=cluster).go(chosen, evaluator)


def _aim(
    every: Sequence[Problem], folder: Path, effort: Effort, missing: bool
) -> tuple[Sequence[Problem], list[str], list[str]]:
    """The problems to be searched, what there is to say of the others, and what all of them are called."""
    names = [problem.id for problem in every]
    if effort.narrow:
        chosen = most_needed(every, lambda problem: _is_served(problem, folder))
        note = f"effort {effort.name}: {len(chosen)} of {len(every)} calls, the dearest of each kind without a record"
        return chosen, [note], names
    if missing:
        chosen = [problem for problem in every if not _is_served(problem, folder)]
        return chosen, [f"{len(chosen)} of {len(every)} calls have no record of their own"], names
    return every, [], names


def _processes(wished: int | None, offline: bool, devices: Sequence[str], cluster: Cluster | None) -> int:
    """How many compilers run at once: none here where other hosts have theirs."""
    return 0 if cluster else wished or cores(spare=0 if offline else 1 + len(devices))


def _compilers(wanted: Sequence[tuple[Op, Spec]], gpu: Gpu, ledger: Ledger, backends: Sequence[str], size: int) -> CompilePool:
    return CompilePool(gpu, ledger.builds, size, compile=ranking.compile, log=ledger.log, backends=_compiled(wanted, backends))


def _judge(pool: CompilePool, ledger: Ledger, offline: bool, devices: Sequence[str]) -> Evaluator:
    return ModelEvaluator(pool) if offline else GpuEvaluator(pool, log=ledger.log, devices=devices)


def _compiled(wanted: Sequence[tuple[Op, Spec]], backends: Sequence[str]) -> list[str]:
    """The backends whose compilers a run may need."""
    return list(dict.fromkeys(name for op, _ in wanted for name in op.backends if not backends or name in backends))


def _named(effort: Effort, missing: bool) -> list[str]:
    """What tells the aim of a narrow run from others'; it does not change while records come in."""
    return [effort.name] if effort.narrow else ["missing"] if missing else []


def _is_served(problem: Problem, folder: Path) -> bool:
    """Whether a measured record of its own, of the folder or shipped, serves a problem; one that the default beats does not."""
    folders = {"folder": folder, **search_path()}
    try:
        return lookup(problem.op, problem.spec, problem.case.sizes, problem.gpu, folders).origin in folders
    except NoConfig:  # no kernel of this GPU does, which is noted when its study is to be opened
        return False


@dataclass
class _Run:
    folder: Path
    opener: Opener
    ledger: Ledger
    notify: Notify
    opened: Opened = field(default_factory=Opened)
    written: dict[str, list[Record]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    phase: str = "search"
    cluster: Cluster | None = None
    account: Account | None = None

    def go(self, wanted: Sequence[Problem], evaluator: Evaluator) -> Report:
        """The whole run."""
        for problem in wanted:
            records.require_readable(records.path_of(self.folder, problem.gpu.id, problem.op.name), GpuKey.of(problem.gpu))
        interrupted = False
        try:
            self.opener.open(wanted, self.opened)  # locked from here on
            self.ledger.begin()
            if self.opener.fresh:
                self.ledger.restart()
            try:
                self._settle_all(evaluator)
            except KeyboardInterrupt:
                interrupted = True
                self._salvage()
                self.ledger.save()
            statuses = tuple(map(self._status, self.opened.studies))
        finally:
            self.opened.close()
        if not interrupted:
            self.ledger.finish()
        if not evaluator.measures:
            for line in ranking.trust(f"{study.space.op.name}.{study.space.backend}" for study in self.opened.studies):
                self.opened.note(line)
        return self._report(wanted, statuses, interrupted)

    def _report(self, wanted: Sequence[Problem], statuses: tuple[StudyStatus, ...], interrupted: bool) -> Report:
        for complaint in filter(None, map(_complaint, self.opened.studies)):
            self.opened.note(complaint)
        found = tuple(record for each in self.written.values() for record in each)
        files = dict.fromkeys(records.path_of(self.folder, record.gpu.id, record.op) for record in found)
        return Report(
            records=found,
            files=tuple(files),
            studies=statuses,
            notes=tuple(self.opened.notes),
            interrupted=interrupted,
            elapsed_s=self.ledger.elapsed_s,
            missing=tuple(self._missing(problem) for problem in wanted if not self._served(problem)),
            failures=tuple(failure for study in self.opened.studies for failure in _failures(study)),
            changes=tuple(self.changes),
            account=self.account,
        )

    def _settle_all(self, evaluator: Evaluator) -> None:
        if self.cluster:
            self._elsewhere(self.cluster, evaluator.search_share)
        else:
            self._search(evaluator)
            self._finals(evaluator)

    def _search(self, evaluator: Evaluator) -> None:
        search, begun = Search(self.opened.studies, evaluator, self._tell), time.monotonic()
        search.run(self.ledger.deadline(evaluator.search_share))
        self.account = search.account(time.monotonic() - begun)

    def _elsewhere(self, cluster: Cluster, share: float) -> None:
        """Search and finals on a cluster's hosts."""
        cluster.search(self.opened.studies, time.time() + self.ledger.deadline(share) - time.monotonic(), self._tell)
        self.phase = "finals"
        defaults, serving = self.opened.defaults, self.opened.serving
        wanted = [(each, studies, defaults[each.id], serving.get(each.id, {})) for each, studies in self.opened.by_problem()]
        cluster.settle(wanted, _FINAL_SECONDS, self._write, self._tell)
        self.phase = "done"
        self._tell()

    def _served(self, problem: Problem) -> bool:
        """Whether a record of this run, or one that it left as it was, is the problem's own."""
        return bool(self.written.get(problem.id) or self.opened.serving.get(problem.id))

    def _missing(self, problem: Problem) -> Missing:
        studies = [study for study, of in self.opened.studies.items() if of is problem]
        seen = sum(len(study.seen) for study in studies)
        if not studies:
            return Missing(problem, "left out", False)
        if any(study.failure for study in studies):
            return Missing(problem, "it cannot be set up", True)
        if seen and not any(study.counts[Kind.OK] for study in studies):
            return Missing(problem, f"none of the {seen} candidates that were tried is right", True)
        return Missing(problem, "the budget ended before its default was timed", False)

    def _finals(self, evaluator: Evaluator) -> None:
        self.phase = "finals"
        waiting = self.opened.by_problem()
        if evaluator.measures:
            self._rebuild(evaluator)
        while waiting:
            problem, studies = waiting[0]
            left_s = self.ledger.deadline(1.0) - time.monotonic()
            limit_s = min(_FINAL_SECONDS, max(0.2, left_s / (2 * len(waiting))))
            settled = self._settle(problem, studies, evaluator, limit_s)
            if evaluator.measures:
                for each in settled:
                    keep(evaluator.built(each.candidate))
            self._write(problem, settled)
            waiting = waiting[1:]
            self._tell()
        self.phase = "done"
        self._tell()

    def _rebuild(self, evaluator: Evaluator) -> None:
        """Candidates of an earlier run may have to be compiled again before they can run; what else is compiled is let be."""
        defaults, serving = self.opened.defaults, self.opened.serving
        field = [
            each.candidate
            for problem, studies in self.opened.by_problem()
            for each in contenders(studies, defaults[problem.id], serving.get(problem.id, {}))
        ]
        evaluator.finish_builds(field, self._tell)

    def _salvage(self) -> None:
        """Interrupted: write what the search has found so far, without a final."""
        for problem, studies in self.opened.by_problem():
            if problem.id not in self.written:
                self._write(problem, self._settle(problem, studies, None))

    def _settle(
        self, problem: Problem, studies: Sequence[Study], evaluator: Evaluator | None, limit_s: float = _FINAL_SECONDS
    ) -> list[Settled]:
        default, serving = self.opened.defaults[problem.id], self.opened.serving.get(problem.id, {})
        return settle(problem, studies, default, evaluator, seed=self.opener.seed, limit_s=limit_s, serving=serving)

    def _write(self, problem: Problem, settled: Sequence[Settled]) -> None:
        self.written[problem.id] = [each.record for each in settled]
        self.changes += [each.change for each in settled]
        records.merge(self.folder, self.written[problem.id])

    def _tell(self) -> None:
        ledger = self.ledger
        ledger.tick()
        statuses = tuple(map(self._status, self.opened.studies))
        count = len(self.opened.by_problem())
        self.notify(Progress(self.phase, ledger.elapsed_s, ledger.budget_s, statuses, len(self.written), count))

    def _status(self, study: Study) -> StudyStatus:
        known = study.outcome_of(self.opened.defaults[self.opened.studies[study].id])
        default_us = known[1].time_us if known and known[1].ok else None
        best_us = study.best.time_us if study.best else None
        counts = dict(study.counts)
        return StudyStatus(
            study.label, study.space.spec.id, len(study.seen), study.trials, best_us, default_us, counts, study.exhausted
        )


def _failures(study: Study) -> Iterator[Failure]:
    """The kinds of failures among a study's candidates, each with the first and how to see it again."""
    for kind, message in study.first_failure.items():
        if study.counts[kind]:
            again = f"{study.path}:{study.failed_trial[kind]}" if study.path.exists() else ""
            yield Failure(study.label, kind, study.counts[kind], message, again)


def _complaint(study: Study) -> str:
    """A line for a study most of whose candidates failed in one way; a broken path must not hide behind a healthy one."""
    if study.failure:
        return f"{study.label}: {study.failure}"
    for kind, message in study.first_failure.items():
        if kind is not Kind.OK and 2 * study.counts[kind] > len(study.seen):
            return f"{study.label}: {study.counts[kind]} of {len(study.seen)} candidates: {kind.value}; the first: {message}"
    return ""
