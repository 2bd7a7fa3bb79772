"""Campaign: a whole benchmark run: everything is built ahead, then the cases are held one by one in a child process.

A crash or a hang costs its case a second try without the peer that caused it, never the run; a peer that does it again in a
stage is left out of the stage's other cases. Rows are written as they come, so that a run that is cut off keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DsaError
from ..gpu import Gpu
from ..worker import JobFailed, Worker, WorkerDied, WorkerTimeout
from . import ahead, contest, results
from . import peers as adapters
from .cases import BenchCase
from .ceilings import measure_ceilings, roofs
from .contest import OURS, How, Outcome
from .deadline import Deadline
from .problems import Roofs
from .results import Row
from .summary import failure, summarise

CASE_SECONDS = 60.0
TRY_SECONDS = 30.0
LEAST_SECONDS = 0.2
"""Of the device, for the cold samples of a case, however little time is left: three rounds or more."""
SHARE = 0.5
"""Of a case's time that may go into them; the rest draws inputs, compares and captures."""
CRASHES = 2
"""So often a peer may take the process with it in a stage."""

Notify = Callable[[str, int, int, "Row | None"], None]
"""Called with what is being done, how many steps are behind, how many there are, and the row that has just been written."""


@dataclass
class Campaign:
    """One run.

    Args:
        folder: rows and machine facts are merged into files below it.
        sources: modules that state peers; none for ours alone.
        deadline: no case begins after it.
    """

    gpu: Gpu
    folder: Path
    sources: Sequence[str]
    commit: str
    toolchain: Mapping[str, str]
    how: How = field(default_factory=How)
    notify: Notify = lambda what, done, of, row: None
    deadline: Deadline = field(default_factory=Deadline)
    unreached: list[BenchCase] = field(default_factory=list)
    """The cases that the deadline left."""
    _waiting: int = 1
    """Cases that are not behind yet."""
    _crashes: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def against(self) -> list[str]:
        """The adapters that were asked for, by name."""
        return [source.rpartition(".")[2] for source in self.sources]

    def run(self, cases: Sequence[BenchCase], rebuild: bool = True) -> list[Row]:
        """Hold every case until the deadline; what is returned has been written."""
        rows: list[Row] = []
        with Worker() as worker:
            if rebuild:
                self.notify("compiling", 0, len(cases), None)
                worker.submit(contest.get_ready, self.sources, self.how.device, timeout=TRY_SECONDS)  # while compilers run
                found = ahead.build(cases, self.gpu, self._peers, self.sources, self.how.device, self.deadline)
                self._crashes = {who: [reason] for who, reason in found.items()}
                self._await(worker)
            limits = self.ceilings(worker)
            for number, case in enumerate(cases):
                self.notify(case.id, number, len(cases), None)
                self._waiting = len(cases) - number
                row = None if self.deadline.passed else self.hold(worker, case, limits)
                if row is None:
                    self.unreached = list(cases[number:])
                    break
                results.merge_rows(results.rows_path(self.folder, self.gpu.id), [row])
                rows.append(row)
                self.notify(case.id, number + 1, len(cases), row)
        return rows

    def ceilings(self, worker: Worker) -> Roofs:
        """Measure what the GPU reaches, once; the datasheet stands in where that fails."""
        if not self.how.device.startswith("cuda"):
            return Roofs.of_datasheet(self.gpu)
        try:
            measured: dict[str, Any] = worker.call(measure_ceilings, timeout=TRY_SECONDS)
        except DsaError as error:
            self.notify(f"ceilings: {error}", 0, 1, None)
            return Roofs.of_datasheet(self.gpu)
        self.note(ceilings={**measured, **self.facts()})
        return roofs(measured, self.gpu)

    def note(self, **facts: Any) -> None:
        """Write what was measured of the machine."""
        results.merge_machine(results.machine_path(self.folder, self.gpu.id), facts)

    def facts(self, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """When, of which commit and with which versions something was measured."""
        return {"date": results.now(), "commit": self.commit, "toolchain": {**self.toolchain, **(versions or {})}}

    def hold(self, worker: Worker, case: BenchCase, limits: Roofs) -> Row | None:
        """One case; peers that take the process with them are left out of a second try. None: the deadline came first."""
        without = self._given_up(case)
        for suspects in (self._culprits, self._every_peer, None):
            try:
                outcome = self._contest(worker, case, without)
            except DsaError as error:
                if self.deadline.passed:
                    return None
                if suspects is None:
                    return self._row(case, failure(case, {**without, OURS: f"failed: {error}"}, limits), None)
                without |= suspects(worker, case, error)
                continue
            entries = (*outcome.entries, *(contest.Entry(name, note=reason) for name, reason in without.items()))
            outcome = replace(outcome, entries=entries)
            return self._row(case, summarise(case, outcome, limits), outcome.versions)
        return None

    def _contest(self, worker: Worker, case: BenchCase, without: Mapping[str, str]) -> Outcome:
        timeout = min(CASE_SECONDS, self.deadline.left)
        try:
            how = self.paced()
            result: Outcome = worker.call(contest.hold, case, self.gpu, self.sources, tuple(without), how, timeout=timeout)
            return result
        except JobFailed:
            worker.kill()  # whatever raised may have left the device unusable
            raise

    def paced(self) -> How:
        """How a case is held when all that wait shall fit into the time that is left."""
        share = SHARE * self.deadline.left / max(self._waiting, 1)
        return replace(self.how, limit_s=min(self.how.limit_s, max(LEAST_SECONDS, share)))

    def _given_up(self, case: BenchCase) -> dict[str, str]:
        reasons = {peer.name: self._crashes.get((peer.name, case.stage), []) for peer in self._peers(case)}
        often = {name: found for name, found in reasons.items() if len(found) >= CRASHES}
        return {name: f"left out after {len(found)} times: {found[-1]}" for name, found in often.items()}

    def _culprits(self, worker: Worker, case: BenchCase, error: DsaError) -> dict[str, str]:
        """Whose single call ends the process, never ends, or fails."""
        found = {}
        given_up = self._given_up(case)
        for name in (OURS, *(peer.name for peer in self._peers(case) if peer.name not in given_up)):
            if self.deadline.passed:
                break
            try:
                timeout = min(TRY_SECONDS, self.deadline.left)
                worker.call(contest.attempt, case, self.sources, name, self.how.device, timeout=timeout)
            except (WorkerDied, WorkerTimeout) as crash:
                found[name] = f"crashed: {crash}"
            except JobFailed as failed:
                found[name] = f"failed: {failed}"
                worker.kill()
        for name, reason in found.items():
            self._crashes.setdefault((name, case.stage), []).append(reason)
        return found

    def _every_peer(self, worker: Worker, case: BenchCase, error: DsaError) -> dict[str, str]:
        return {peer.name: f"left out: {error}" for peer in self._peers(case)}

    def _await(self, worker: Worker) -> None:
        try:
            worker.result()
        except DsaError:
            worker.kill()  # whatever it was happens again, and is told, in a case

    def _peers(self, case: BenchCase) -> list[adapters.Peer]:
        return [peer for peer in adapters.load(self.sources) if case.stage in peer.stages]

    def _row(self, case: BenchCase, measured: Mapping[str, Any], versions: Mapping[str, str] | None) -> Row:
        return results.row_of(case, {**measured, "against": self.against}, self.facts(versions))
