"""Sweeping: measures every config of a search space on the GPU at hand, each in several visits spread over the whole time.

Every config is checked on its case before it is timed: fresh inputs, poisoned outputs, the reference. Its calls are captured
in a graph that stays; visits then go round all graphs in ever new orders, so that what drifts meets all alike.
"""

from __future__ import annotations

import datetime
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels import anatomy
from ..kernels.build import Built
from ..kernels.toolchain import versions
from ..kernels.variant import Variant
from ..problem.op import Case, Op
from ..problem.values import Spec
from ..proof.measure import InputSet
from ..proof.stopwatch import CudaStopwatch, Run
from ..records.record import GpuKey
from ..worker import JobFailed, Worker, WorkerDied, WorkerTimeout
from . import jobs
from .lane import POISONED, PREPARE_SECONDS, RUN_SECONDS
from .outcome import Kind, Outcome
from .pool import CompilePool
from .problem import Entrant, Problem
from .space import Candidate, Key, Space
from .sweep import Entry, Source, Sweep, SweptCase, Times

VISITS = 5
VISIT_SECONDS = 300.0
_CALLS = 20  # of a graph, at least; as ``proof.timing.COLD``
_REPLAYS = 3  # timed in a visit, behind one that is not
_FAR_BEHIND = 4.0  # times the fastest: visited once
_IDLE_SECONDS = 0.005

# State of the worker's process.
_runs: dict[Key, tuple[Run, int]] = {}
_variants: dict[Key, Variant] = {}


def enter(problem: Problem, entrant: Entrant) -> Outcome:
    """Check a candidate on the problem's case, and capture its calls for later visits."""
    variant = jobs.variant_of(problem, entrant)
    accuracy, _ = jobs.on_workload(problem, variant)
    if not accuracy.passed:
        return Outcome(Kind.MISMATCH, accuracy=accuracy, detail=accuracy.detail)
    sets = jobs.prepared_for(problem).sets
    count = max(_CALLS, len(sets))
    calls = [_call(variant, sets[number % len(sets)]) for number in range(count)]
    run = CudaStopwatch().capture(calls)
    if run is None:
        return Outcome(Kind.LAUNCH_ERROR, detail="its calls cannot be captured in a graph")
    _runs[entrant.candidate.key], _variants[entrant.candidate.key] = (run, count), variant
    return Outcome(Kind.OK, accuracy=accuracy)


def _call(variant: Variant, each: InputSet) -> Run:
    def call() -> None:
        variant.run(each.inputs, each.outputs)

    return call


def visit(keys: Sequence[Key]) -> list[float]:
    """Microseconds per call of what was entered, one after another."""
    stopwatch, found = CudaStopwatch(), []
    for key in keys:
        run, count = _runs[key]
        stopwatch.time_us(run)
        found.append(statistics.median(stopwatch.time_us(run) for _ in range(_REPLAYS)) / count)
    return found


def leave() -> None:
    """Forget what was entered."""
    _runs.clear()
    _variants.clear()


@dataclass(frozen=True)
class Table:
    """What runs in the GPU's process; other functions than these are for tests."""

    prepare: Callable[..., None] = jobs.prepare
    enter: Callable[..., Outcome] = enter
    visit: Callable[..., list[float]] = visit
    leave: Callable[..., None] = leave


def candidates(op: Op, space: Space, cases: Sequence[Case]) -> list[Candidate]:
    """The configs of a space that serve one of the cases, rendered."""
    configs = space.feasible()
    assert configs is not None, "the space is too large to be swept"
    serving = (c for c in configs if any(not list(op.reach(space.spec, c, case.sizes.bucket())) for case in cases))
    return [space.candidate(config) for config in serving]


def sweep(
    op: Op,
    spec: Spec,
    cases: Sequence[Case],
    pool: CompilePool,
    space: Space,
    *,
    visits: int = VISITS,
    seed: int = 0,
    table: Table = Table(),
    worker: Worker | None = None,
    tell: Callable[[str], None] = lambda text: None,
    keep: Callable[[Sweep], None] = lambda sweep: None,
) -> Sweep:
    """Every config of ``space`` (whose bucket is left aside) on every case that it can serve.

    Args:
        pool: compiles by ``anatomy.dissected``.
        visits: of each config and case.
        tell: a line now and then.
        keep: the sweep so far, after every case.
    """
    sweeper = _Sweeper(op, spec, pool, space, random.Random(seed), table, worker or Worker(), visits, tell, keep)
    with sweeper.worker:
        return sweeper.go(cases)


@dataclass
class _Sweeper:
    op: Op
    spec: Spec
    pool: CompilePool
    space: Space
    order: random.Random
    table: Table
    worker: Worker
    visits: int
    tell: Callable[[str], None]
    keep: Callable[[Sweep], None]

    def go(self, cases: Sequence[Case]) -> Sweep:
        """The whole sweep."""
        self.candidates = candidates(self.op, self.space, cases)
        distinct = list({each.key: each for each in self.candidates}.values())
        self.order.shuffle(distinct)
        for each in distinct:
            self.pool.request(each.rendered)
        shas = dict.fromkeys(each.rendered.sha for each in self.candidates)
        self.tell(f"{len(self.candidates)} configs, {len(distinct)} candidates, {len(shas)} sources")
        swept: list[SweptCase] = []
        for case in cases:
            swept.append(self._case(case, [each for each in distinct if self._serves(each, case)]))
            self.keep(self._sweep(list(shas), swept))
        return self._sweep(list(shas), swept)

    def _serves(self, candidate: Candidate, case: Case) -> bool:
        return not list(self.op.reach(self.spec, candidate.config, case.sizes.bucket()))

    def _call(self, job: Callable[..., Any], *args: Any, timeout: float = VISIT_SECONDS) -> Any:
        """The result of a job, while the compilers are given what waits for them."""
        self.worker.submit(job, *args, timeout=timeout)
        while not self.worker.ready():
            self.pool.poll()
            time.sleep(_IDLE_SECONDS / 10)
        return self.worker.result()

    def _sweep(self, shas: Sequence[str], swept: Sequence[SweptCase]) -> Sweep:
        numbers = {sha: number for number, sha in enumerate(shas)}
        return Sweep(
            self.op,
            self.space.backend,
            self.spec,
            GpuKey.of(self.space.gpu),
            versions(self.space.backend),
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            self.space.table,
            tuple(map(self._source, shas)),
            tuple(Entry(each.config, numbers[each.rendered.sha]) for each in self.candidates),
            tuple(swept),
        )

    def _case(self, case: Case, serving: Sequence[Candidate]) -> SweptCase:
        problem, begun = Problem(self.op, self.spec, case, self.space.gpu), time.monotonic()
        self._prepare(problem)
        results, entered = self._entered(problem, serving)
        self.tell(f"{case.id}: {len(entered)} of {len(serving)} right, {time.monotonic() - begun:.0f} s")
        results.update(self._visited(entered))
        self._call(self.table.leave)
        self.tell(f"{case.id}: visited, {time.monotonic() - begun:.0f} s")
        default = self.op.default_config(self.spec, case.sizes, self.space.gpu, self.space.backend)
        return SweptCase(case, default, tuple(results.get(each.key) for each in self.candidates))

    def _prepare(self, problem: Problem) -> None:
        self._call(self.table.prepare, problem, self.space.backend, timeout=PREPARE_SECONDS)

    def _entered(self, problem: Problem, serving: Sequence[Candidate]) -> tuple[dict[Key, Times | str], list[Candidate]]:
        """Enter all as they are built: the kinds of failures, and what is ready to be visited."""
        failures: dict[Key, Times | str] = {}
        entered: list[Candidate] = []
        waiting = list(serving)
        while waiting:
            self.pool.poll()
            ready = [each for each in waiting if each.rendered.sha in self.pool.results]
            for each in ready:
                kind = self._enter(problem, each)
                if kind is Kind.OK:
                    entered.append(each)
                else:
                    failures[each.key] = kind.value
                    self._recover(problem, entered)
            waiting = [each for each in waiting if each not in ready]
            time.sleep(_IDLE_SECONDS)
        return failures, entered

    def _enter(self, problem: Problem, candidate: Candidate) -> Kind:
        built = self.pool.results[candidate.rendered.sha]
        if isinstance(built, Outcome):
            return built.kind
        try:
            outcome: Outcome = self._call(self.table.enter, problem, Entrant(candidate, built), timeout=RUN_SECONDS)
            return outcome.kind
        except WorkerTimeout:
            return Kind.RUN_TIMEOUT
        except WorkerDied:
            return Kind.WORKER_DIED
        except JobFailed as error:
            self.tell(f"{candidate.config}: {error}"[:300])
            if POISONED.search(error.message):
                self.worker.kill()
            return Kind.LAUNCH_ERROR

    def _recover(self, problem: Problem, entered: Sequence[Candidate]) -> None:
        """Where a candidate took the process along, enter in a new one what was right."""
        if not self.worker.alive:
            self._prepare(problem)
            for each in entered:
                self._enter(problem, each)

    def _visited(self, entered: Sequence[Candidate]) -> dict[Key, Times]:
        times: dict[Key, list[float]] = {each.key: [] for each in entered}
        keys = list(times)
        for _ in range(self.visits):
            self.order.shuffle(keys)
            for key, taken in zip(keys, self._call(self.table.visit, keys), strict=True):
                times[key].append(taken)
            best = min(taken[0] for taken in times.values())
            keys = [key for key in keys if times[key][0] <= _FAR_BEHIND * best]
        return {key: tuple(taken) for key, taken in times.items()}

    def _source(self, sha: str) -> Source:
        built, seconds = self.pool.results.get(sha), self.pool.seconds.get(sha, 0.0)
        if not isinstance(built, Built):
            return Source(seconds, failure=built.kind.value if built else "not compiled")
        return Source(seconds, built.resources, _mix(built))


def _mix(built: Built) -> Mapping[str, Mapping[str, int]]:
    anatomies = built.anatomies if isinstance(built, anatomy.Dissected) else {}
    return {name: each.mix for name, each in anatomies.items()}
