"""Refresh: records whose template or whose default changed are checked and timed again, beside the default; no search.

Seconds a record: what has to be built is known beforehand, so the compilers work through it while one process checks and times
what is ready. A config that is no longer possible, right or worth it gives way to the default; a record that nothing can
replace is dropped. Records of GPUs that are not here stay as they are, or go where that is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..gpu import Gpu
from ..ops import all_ops
from ..records import files as records
from ..records.default import default_of, default_sha
from ..records.lookup import missing_tool
from ..records.record import GpuKey, Record
from .evaluate import Evaluator
from .ledger import Ledger
from .on_gpu import GpuEvaluator
from .plan import STATE, require_writable
from .pool import CompilePool, cores
from .renewal import Fate, Task, renew, task_of
from .standing import Standing, standing

_IDLE_SECONDS = 0.01

Tell = Callable[[int, int], None]
"""Called with the number of problems that are done and that there are."""


@dataclass(frozen=True)
class Wish:
    """Which records are looked at, and what happens to those that cannot be measured here.

    Args:
        names: of these operations; empty means all.
        gpu_id: of this GPU; empty means all.
        every: also those that hold.
        drop: the ones that do not hold and cannot be measured here are dropped.
    """

    names: Sequence[str] = ()
    gpu_id: str = ""
    every: bool = False
    drop: bool = False

    def among(self, folder: Path) -> list[Record]:
        """The records of ``folder`` that are wished for."""
        found = (record for name in self.names or all_ops() for record in records.read_all(folder, name))
        return [record for record in found if self.gpu_id in ("", record.gpu.id)]


@dataclass
class Refreshed:
    """What a refresh leaves; it grows while the refresh is under way."""

    fates: list[Fate] = field(default_factory=list)
    holding: int = 0
    """Records that hold as they are and were not touched."""
    files: dict[Path, None] = field(default_factory=dict)
    elapsed_s: float = 0.0
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether no record is left that does not hold."""
        return not any(fate.what == "left" for fate in self.fates)


def refresh(
    folder: Path,
    here: Gpu | None,
    wish: Wish | None = None,
    *,
    budget_s: float | None = None,
    processes: int | None = None,
    state: Path = STATE,
    tell: Tell = lambda done, all_: None,
) -> Refreshed:
    """Bring the records of ``folder`` up to today's templates; each is written as soon as it is settled.

    Args:
        here: the GPU at hand, whose records can be measured; None where there is none.
        budget_s: no problem is begun after so many seconds.
        processes: compilers that run at once; by default the cores but two.

    Raises:
        StudyBusy: another process refreshes records of this GPU.
        RecordError: a file of records cannot be read or written.
        InputError: the folder cannot be written; nothing is touched.
    """
    require_writable(folder, "folder")
    require_writable(state, "state")
    return Refresh(folder, here, wish or Wish(), tell).go(budget_s, processes, state)


@dataclass
class Refresh:
    """The records of a folder gone through, compiled ahead, and judged one problem after another.

    Args:
        aim: what keeps two of the same kind apart.
    """

    folder: Path
    here: Gpu | None
    wish: Wish
    tell: Tell
    report: Refreshed = field(default_factory=Refreshed)
    aim: str = "refresh"

    def go(self, budget_s: float | None, processes: int | None, state: Path) -> Refreshed:
        """The whole of it."""
        begun = time.monotonic()
        tasks = self._tasks()
        if tasks and self.here is not None:
            with Ledger(state / self.here.id, [self.aim], budget_s) as ledger:
                ledger.restart()
                self._on(self.here, tasks, ledger, processes or cores(spare=2))
                ledger.finish()
        self.report.elapsed_s = time.monotonic() - begun
        return self.report

    def _on(self, gpu: Gpu, tasks: list[Task], ledger: Ledger, processes: int) -> None:
        pool = CompilePool(gpu, ledger.builds, processes, log=ledger.log)
        with pool, GpuEvaluator(pool, log=ledger.log) as evaluator:
            self._measure(tasks, evaluator, ledger.deadline(1.0))

    def _tasks(self) -> list[Task]:
        """What has to be measured; whatever has not is settled at once."""
        measurable: dict[str, list[Standing]] = {}
        for record in self.wish.among(self.folder):
            state = standing(record)
            timed = state.holds or state.template  # its own code is the one that was
            if timed and not self.wish.every and not self._has_new_rival(state):
                self._stand(state)
            elif self._can_measure(state):
                measurable.setdefault(state.place, []).append(state)
        return [task_of(states, self.here) for states in measurable.values() if self.here is not None]

    def _has_new_rival(self, state: Standing) -> bool:
        """Whether another default would serve today than the one that the record was timed beside, or it names none.

        The record's own code may be the same; what it was found faster than no longer serves anybody.
        """
        if self.here is None or state.record.gpu != GpuKey.of(self.here) or state.call is None:
            return False
        op, spec, case = state.call
        default = default_of(op, spec, case.sizes, self.here)
        if default is None or missing_tool(default.backend):
            return False
        return default_sha(op, spec, default) != state.record.default_sha

    def _can_measure(self, state: Standing) -> bool:
        """Whether this machine can; where it cannot, the record's fate is settled."""
        record = state.record
        if self.here is None or record.gpu != GpuKey.of(self.here):
            return self._give_up(state, f"{record.gpu.id} ({record.gpu.sms} SMs) is not here")
        if state.call is None:
            self._settle([Fate(record, "dropped", state.reason)])
            return False
        lacking = missing_tool(record.backend) if state.config else None
        return not lacking or self._give_up(state, lacking)

    def _give_up(self, state: Standing, why: str) -> bool:
        if state.holds:
            self.report.holding += 1
        else:
            what = "dropped" if self.wish.drop else "left"
            self._settle([Fate(state.record, what, f"{state.reason}; {why}")])
        return False

    def _stand(self, state: Standing) -> None:
        if state.holds:
            self.report.holding += 1
            return
        fresh = replace(state.record, template=state.template)
        self._settle([Fate(state.record, "carried", state.reason, fresh)])

    def _measure(self, tasks: list[Task], evaluator: Evaluator, deadline: float) -> None:
        for task in tasks:
            for candidate in task.candidates:
                evaluator.pool.request(candidate.rendered)
        waiting, total = list(tasks), len(tasks)
        try:
            while waiting and time.monotonic() < deadline:
                self.tell(total - len(waiting), total)
                ready = next((task for task in waiting if _compiled(task, evaluator)), None)
                if ready is None:
                    evaluator.pool.poll()
                    time.sleep(_IDLE_SECONDS)
                    continue
                self._settle(self._judge(ready, evaluator))
                waiting.remove(ready)
        except KeyboardInterrupt:
            self.report.interrupted = True
        why = "interrupted" if self.report.interrupted else "the budget was spent"
        self._settle([Fate(record, "left", why) for task in waiting for record in task.old])
        self.tell(total, total)

    def _judge(self, task: Task, evaluator: Evaluator) -> list[Fate]:
        return renew(task, evaluator, drop=self.wish.drop)

    def _settle(self, fates: Sequence[Fate]) -> None:
        fresh = [fate.now for fate in fates if fate.now is not None]
        keys = [(record.key, record.gpu) for record in fresh]
        replaced = [fate.old for fate in fates if fate.old is not None and fate.what != "left"]
        gone = [old for old in replaced if (old.key, old.gpu) not in keys]
        for path in records.merge(self.folder, fresh, gone):
            self.report.files[path] = None
        self.report.fates += fates


def _compiled(task: Task, evaluator: Evaluator) -> bool:
    """Whether each of its sources has a build, or a reason why not."""
    return all(evaluator.compiled(candidate) for candidate in task.candidates)
