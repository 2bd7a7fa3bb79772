"""Opening: from problems to studies, each with its default and its near neighbours' records as first candidates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from ..errors import DsaError, NoConfig
from ..problem.op import Config, Op
from ..records.explain import nearest
from ..records.files import read_all
from ..records.lookup import missing_tool, search_path
from ..records.record import Record
from .incumbent import Incumbent, incumbents
from .journal import Journal
from .lock import IMPATIENT, Patience
from .problem import Problem
from .shelf import Shelf
from .space import Space
from .study import FILES, Study

_NEIGHBOURS = 3  # tuned configs of near problems that a search begins with


@dataclass
class Opened:
    """The studies of a run. Close them, or no other process can use them."""

    studies: dict[Study, Problem] = field(default_factory=dict)
    defaults: dict[str, Config] = field(default_factory=dict)
    """By the problem's id: what the dispatcher would use untuned."""
    serving: dict[str, dict[str, Incumbent]] = field(default_factory=dict)
    """By the problem's id and backend: the measured record that serves it today."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def by_problem(self) -> list[tuple[Problem, list[Study]]]:
        """The problems in order, with the studies of their backends."""
        found: dict[str, tuple[Problem, list[Study]]] = {}
        for study, problem in self.studies.items():
            found.setdefault(problem.id, (problem, []))[1].append(study)
        return list(found.values())

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def close(self) -> None:
        """Let other processes use the studies."""
        for study in self.studies:
            study.close()


@dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens studies.

    Args:
        folder: of the journals, ``.tune/<gpu>``.
        tuned: of the records that the run will write; those that are there are seeds.
        method: the evaluator's, which studies of one name share.
        measures: whether times are measured, not modelled: records that serve today then take part.
        trials: candidates of a study at most.
        fresh: forget what earlier runs found.
        backends: only these; empty means all, or, where nothing is measured, the default's: no model compares compilers.
        patience: with other runs that use the same studies.
        shelf: where trials are kept.
        narrow: only the backends of the default and of the nearest records.
    """

    folder: Path
    tuned: Path
    method: str
    measures: bool
    trials: int
    seed: int = 0
    fresh: bool = False
    backends: Sequence[str] = ()
    patience: Patience = IMPATIENT
    shelf: Shelf = FILES
    narrow: bool = False

    def open(self, problems: Sequence[Problem], opened: Opened) -> None:
        """Open a study for every problem and backend that this GPU and this machine can serve; ``opened`` grows by them.

        All are locked before any is touched: where another process has one, nothing of the others is forgotten.

        Raises:
            StudyBusy: another process has one, and keeps it.
        """
        wanted = [each for problem in problems for each in self._wanted(problem, opened)]
        journals = [Journal.of(space, problem.case, self.folder, self.method).path for problem, space, _ in wanted]
        locks = self.patience.take_all(journals)
        for (problem, space, first), lock in zip(wanted, locks, strict=True):
            held = opened.serving.get(problem.id, {}).get(space.backend)
            seeds = [first, *([held.config] if held else []), *self._neighbours(problem, space.backend)]
            opened.studies[self._study(problem, space, seeds, lock)] = problem

    def _wanted(self, problem: Problem, opened: Opened) -> Iterator[tuple[Problem, Space, Config]]:
        """The backends of a problem that can be searched, each with its default; the others are noted."""
        op, gpu = problem.op, problem.gpu
        if gpu.capability < op.min_capability:
            opened.note(f"{op.name}: needs sm_{op.min_capability} or newer, {gpu.name} is sm_{gpu.capability}")
            return
        try:
            opened.defaults[problem.id] = op.default_config(problem.spec, problem.case.sizes, gpu)
        except NoConfig as error:
            opened.note(str(error))
            return
        if self.measures:
            others = (folder for folder in search_path().values() if folder != self.tuned)
            opened.serving[problem.id] = incumbents(problem, [self.tuned, *others])
        for backend in self._backends(problem, opened.defaults[problem.id]):
            lacking = missing_tool(backend)
            if lacking:
                opened.note(f"{op.name}: left out {lacking}")
                continue
            try:
                first = op.default_config(problem.spec, problem.case.sizes, gpu, backend)
            except NoConfig as error:
                opened.note(str(error))
                continue
            yield problem, Space(op, problem.spec, backend, gpu, problem.case.sizes.bucket()), first

    def _backends(self, problem: Problem, default: Config) -> list[str]:
        usual: Collection[str] = problem.op.backends if self.measures else (default.backend,)
        if self.narrow and not self.backends:
            usual = {default.backend, *(record.backend for record in self._nearest(problem)[:_NEIGHBOURS])}
        return [backend for backend in problem.op.backends if backend in (self.backends or usual)]

    def _study(self, problem: Problem, space: Space, seeds: Sequence[Config], lock: filelock.BaseFileLock) -> Study:
        return Study(
            space,
            problem.case,
            self.folder,
            method=self.method,
            trials=self.trials,
            seeds=seeds,
            seed=self.seed,
            fresh=self.fresh,
            lock=lock,
            shelf=self.shelf,
        )

    def _neighbours(self, problem: Problem, backend: str) -> list[Config]:
        """Configs of the nearest records that the operation still accepts."""
        near = (record for record in self._nearest(problem) if record.backend == backend)
        distinct = dict.fromkeys(record.config_for(problem.op) for record in near)
        return list(distinct)[:_NEIGHBOURS]

    def _nearest(self, problem: Problem) -> list[Record]:
        """All records that the operation still accepts, the nearest first."""
        folders = sorted({*search_path().values(), self.tuned})
        known = [record for folder in folders for record in read_all(folder, problem.op.name)]
        usable = [record for record in known if _accepted(record, problem.op)]
        return nearest(usable, problem.spec, problem.case.sizes, problem.gpu, len(usable))


def _accepted(record: Record, op: Op) -> bool:
    try:
        record.config_for(op)
    except DsaError:
        return False
    return True
