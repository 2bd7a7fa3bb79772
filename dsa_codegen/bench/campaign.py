"""Campaign: a whole benchmark run: everything is built ahead, then the cases are held one by one in a child process.

A crash or a hang costs its case a second try without the peer that caused it, never the run; rows are written as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
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
from .problems import Roofs
from .results import Row
from .summary import failure, summarise

CASE_SECONDS = 120.0
TRY_SECONDS = 60.0

Notify = Callable[[str, int, int, "Row | None"], None]
"""Called with what is being done, how many steps are behind, how many there are, and the row that has just been written."""


@dataclass
class Campaign:
    """One run.

    Args:
        folder: rows and machine facts are merged into files below it.
        sources: modules that state peers; none for ours alone.
    """

    gpu: Gpu
    folder: Path
    sources: Sequence[str]
    commit: str
    toolchain: Mapping[str, str]
    how: How = field(default_factory=How)
    notify: Notify = lambda what, done, of, row: None

    def run(self, cases: Sequence[BenchCase], rebuild: bool = True) -> list[Row]:
        """Hold every case; what is returned has been written."""
        if rebuild:
            self.notify("compiling", 0, len(cases), None)
            ahead.build(cases, self.gpu, self._peers, self.sources, self.how.device)
        rows = []
        with Worker() as worker:
            limits = self.ceilings(worker)
            for number, case in enumerate(cases):
                self.notify(case.id, number, len(cases), None)
                row = self.hold(worker, case, limits)
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
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"date": now, "commit": self.commit, "toolchain": {**self.toolchain, **(versions or {})}}

    def hold(self, worker: Worker, case: BenchCase, limits: Roofs) -> Row:
        """One case; peers that take the process with them are left out of a second try."""
        left_out: dict[str, str] = {}
        try:
            outcome = self._contest(worker, case, left_out)
        except DsaError as error:
            left_out = self._culprits(worker, case)
            if OURS in left_out:
                left_out[OURS] = f"{left_out[OURS]} ({error})"
            try:
                outcome = self._contest(worker, case, left_out)
            except DsaError as again:
                left_out = {peer.name: f"left out: {again}" for peer in self._peers(case)}
                try:
                    outcome = self._contest(worker, case, left_out)
                except DsaError as alone:
                    return self._row(case, failure(case, {**left_out, OURS: f"failed: {alone}"}, limits), None)
        entries = (*outcome.entries, *(contest.Entry(name, note=reason) for name, reason in left_out.items()))
        outcome = Outcome(entries, outcome.variant, outcome.sets, outcome.cold, outcome.versions)
        return self._row(case, summarise(case, outcome, limits), outcome.versions)

    def _contest(self, worker: Worker, case: BenchCase, without: Mapping[str, str]) -> Outcome:
        try:
            result: Outcome = worker.call(
                contest.hold, case, self.gpu, self.sources, tuple(without), self.how, timeout=CASE_SECONDS
            )
            return result
        except JobFailed:
            worker.kill()  # whatever raised may have left the device unusable
            raise

    def _culprits(self, worker: Worker, case: BenchCase) -> dict[str, str]:
        """Whose single call ends the process, never ends, or fails."""
        found = {}
        for name in (OURS, *(peer.name for peer in self._peers(case))):
            try:
                worker.call(contest.attempt, case, self.sources, name, self.how.device, timeout=TRY_SECONDS)
            except (WorkerDied, WorkerTimeout) as error:
                found[name] = f"crashed: {error}"
            except JobFailed as error:
                found[name] = f"failed: {error}"
                worker.kill()
        return found

    def _peers(self, case: BenchCase) -> list[adapters.Peer]:
        return [peer for peer in adapters.load(self.sources) if case.stage in peer.stages]

    def _row(self, case: BenchCase, measured: Mapping[str, Any], versions: Mapping[str, str] | None) -> Row:
        return results.row_of(case, measured, self.facts(versions))
