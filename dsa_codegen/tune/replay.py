"""Replay: the search over a sweep's times instead of a GPU, on a clock of its own, and how much it loses by not trying all.

Study, search, finals and the choice of the winner are those of every run. What stands in is what takes time: compilers, of
which several work at once, and GPUs, each of which times one candidate after another; both take as long as they took in the
sweep. Asking takes its time too, and there is one who asks, however many GPUs there are.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.build import Built
from ..kernels.render import Rendered
from ..problem.op import Accuracy, Config, Parameter, Violation
from ..proof.measure import Measured
from ..proof.timing import COLD, Timing
from . import model, ranking
from .evaluate import Done, Evaluator, Task
from .outcome import Kind, Outcome
from .pool import CompilePool
from .problem import Problem
from .space import Candidate, Space
from .study import Study
from .sweep import Sweep, Times, gpu_of

METHOD = "replayed"
CORES = 16
"""Of a machine, for each of its GPUs."""
EVALUATE_S = 0.2
"""Seconds to check and time a candidate: wall seconds by trials of the records in ``tuned/``."""
ASK_S = 0.015
"""Seconds to find and to note the next candidate: of a study with 30 known, on one core."""
DOMINATED = 2.0  # as on the GPU: what is so many times slower than the best does not reach the final
_PASSED = Accuracy(True, 0.0, 0.0)


@dataclass(frozen=True)
class SweptSpace(Space):
    """The configs of one case of a sweep, with the parameters and the sources that it states."""

    sweep: Sweep = field(default=None, compare=False)  # type: ignore[assignment]
    case: int = 0

    @classmethod
    def of(cls, sweep: Sweep, case: int) -> SweptSpace:
        """The space of a sweep's case."""
        bucket = sweep.cases[case].case.sizes.bucket()
        return cls(sweep.op, sweep.spec, sweep.backend, gpu_of(sweep), bucket, sweep, case)

    @property
    def table(self) -> tuple[Parameter, ...]:
        return self.sweep.table

    @property
    def template(self) -> str:
        return ""

    @property
    def toolchain(self) -> Mapping[str, str]:
        return self.sweep.toolchain

    def violations(self, config: Config) -> list[Violation]:
        """The operation's own, graded, where it still knows the parameters; and what was not swept is none of the space."""
        if self._swept(config):
            return []
        known = [parameter.name for parameter in self.op.parameters(self.backend)]
        graded = self.op.violations(self.spec, config, self.gpu, self.bucket) if known == [p.name for p in self.table] else []
        return graded or [Violation("swept", 1.0, "swept: no config of the sweep")]

    def feasible(self, limit: int = 0) -> list[Config] | None:
        return [entry.config for entry in self.sweep.entries if self._swept(entry.config)]

    def candidate(self, config: Config) -> Candidate:
        rendered = _rendered(self.sweep, self.sweep.entries[self.sweep.number[config]].source)
        launch = tuple((p.name, config[p.name]) for p in self.table if p.launch_only)
        return Candidate(config, rendered, (rendered.sha, launch))

    def _swept(self, config: Config) -> bool:
        number = self.sweep.number.get(config)
        return number is not None and self.sweep.cases[self.case].results[number] is not None


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ReplayedPool(CompilePool):
    """Stands in for the compilers: a source is done when its seconds have passed."""

    def __init__(self, sweep: Sweep, clock: Clock, size: int) -> None:
        super().__init__(gpu_of(sweep), Path(), 0)
        self._size, self._clock = size, clock
        self._sources = {_rendered(sweep, number).sha: source for number, source in enumerate(sweep.sources)}
        # The first source of each process waited for imports, which a run does while the GPU's process starts.
        usual = statistics.median(source.compile_s for source in sweep.sources)
        self._takes_s = {sha: min(source.compile_s, 2 * usual) for sha, source in self._sources.items()}
        self._ends: dict[str, tuple[float, Rendered]] = {}

    @property
    def size(self) -> int:
        return self._size

    @property
    def backlog(self) -> int:
        return len(self._queue) + len(self._ends)

    @property
    def next_end(self) -> float:
        """When the next source is done; infinite where none is under way."""
        return min((end for end, _ in self._ends.values()), default=math.inf)

    def poll(self) -> None:
        for sha, (end, rendered) in list(self._ends.items()):
            if end <= self._clock.now:
                del self._ends[sha]
                self.results[sha], self.seconds[sha] = self._result(rendered), self._takes_s[sha]
        self._start()

    def _start(self) -> None:
        while self._queue and len(self._ends) < self.size:
            rendered = self._queue.popleft()
            self._ends[rendered.sha] = self._clock.now + self._takes_s[rendered.sha], rendered

    def _result(self, rendered: Rendered) -> Built | Outcome:
        source = self._sources[rendered.sha]
        if source.failure:
            return Outcome(Kind(source.failure))
        return Built(rendered, self._gpu, Path(), source.resources)


class ReplayEvaluator(Evaluator):
    """Judges candidates by one visit of a sweep's, and finalists by as many again.

    Args:
        seed: which visit a candidate gets; two runs of one seed see the same times.
        gpus: that candidates are dealt out to.
        cores: of the machine; by default ``CORES`` for each GPU. All but one, and one for each GPU, compile.
    """

    method = METHOD
    search_share = 0.75
    measures = True
    free = False

    def __init__(self, sweep: Sweep, seed: int, clock: Clock, gpus: int = 1, cores: int = 0) -> None:
        self._pool = ReplayedPool(sweep, clock, max(1, (cores or CORES * gpus) - 1 - gpus))
        super().__init__(self._pool)
        self._sweep, self._clock, self._gpus = sweep, clock, gpus
        self._cases = {each.case.id: each for each in sweep.cases}
        self._draw = random.Random(seed)
        self.judged = 0
        """Candidates, so far."""
        self._judging: list[tuple[float, Task]] = []
        self._asked = False

    @property
    def width(self) -> int:
        return self._gpus

    @property
    def backlog(self) -> int:
        return super().backlog + len(self._judging)

    def submit(self, study: Study, problem: Problem, candidate: Candidate) -> None:
        self._clock.now += ASK_S
        self._asked = True
        super().submit(study, problem, candidate)

    def _advance(self) -> list[Done]:
        """Begin what is ready and end what is over; the time passes until there is something, or there is nothing to ask."""
        while self._ready and len(self._judging) < self._gpus:
            self._judging.append((self._clock.now + EVALUATE_S, self._ready.pop(0)))
        upcoming = min((end for end, _ in self._judging), default=math.inf)
        upcoming = min(upcoming, self._pool.next_end)
        if math.isfinite(upcoming) and not self._asked:
            self._clock.now = max(self._clock.now, upcoming)
        self._asked = False
        over = [task for end, task in self._judging if end <= self._clock.now]
        self._judging = [each for each in self._judging if each[0] > self._clock.now]
        self.judged += len(over)
        return [Done(task, self._judge(task), EVALUATE_S + self._compile_cost(task)) for task in over]

    def estimate_us(self, problem: Problem, candidate: Candidate) -> float:
        source = self._sweep.sources[self._sweep.entries[self._sweep.number[candidate.config]].source]
        launches = model.plan(problem.op, problem.spec, self._sweep.today(candidate.config), problem.case, problem.gpu)
        found = ranking.calibrations()[f"{problem.op.name}.{candidate.config.backend}"]
        return found.time_us(ranking.features(launches, source.resources, source.mix, problem.gpu))

    def _idle(self) -> None:
        if self._pool.backlog:
            self._clock.now = max(self._clock.now, self._pool.next_end)

    def _judge(self, task: Task) -> Outcome:
        result = self._result(task.problem, task.candidate)
        if isinstance(result, str):
            return Outcome(Kind(result), detail="as in the sweep")
        time_us, best = self._draw.choice(result), task.study.best
        timing = Timing(time_us, time_us, time_us, 5)
        dominated = best is not None and time_us > DOMINATED * best.time_us
        return Outcome(Kind.OK, timing, COLD, _PASSED, self._smem(task.candidate), dominated)

    def final(self, problem: Problem, candidates: Sequence[Candidate], limit_s: float) -> list[Measured] | None:
        self._clock.now += limit_s
        results = [self._result(problem, candidate) for candidate in candidates]
        timed = [result for result in results if isinstance(result, tuple)]
        return [Measured(Timing.of(self._draw.choices(result, k=len(result))), COLD, 1) for result in timed]

    def _result(self, problem: Problem, candidate: Candidate) -> Times | str:
        result = self._cases[problem.case.id].results[self._sweep.number[candidate.config]]
        assert result is not None, "the space holds what was swept"
        return result

    def _smem(self, candidate: Candidate) -> int:
        return max(usage.smem for usage in self.built(candidate).resources.values())


def _rendered(sweep: Sweep, source: int) -> Rendered:
    return Rendered(sweep.op.name, sweep.backend, "", f"source {source} of a sweep of {sweep.measured_at}")
