"""A stand-in for the GPU: a landscape of times over the indexer's configs, and jobs that a worker can run without one."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

from support import H200

from dsa_codegen.backends import Resources
from dsa_codegen.build import Built
from dsa_codegen.measure import Measured
from dsa_codegen.op import Accuracy, Case, Config
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.timing import COLD, Timing
from dsa_codegen.tune.evaluate import Done, Evaluator, Task
from dsa_codegen.tune.jobs import Problem
from dsa_codegen.tune.on_gpu import Jobs
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.space import Space
from dsa_codegen.tune.study import Study

SPEC = IndexerSpec(64, 128)
CASE = Case(IndexerSizes(4096, 32768), "causal")
PROBLEM = Problem(OP, SPEC, CASE, H200)
SPACE = Space(OP, SPEC, "triton", H200)
DEFAULT = OP.default_config(SPEC, CASE.sizes, H200)
PASSED = Accuracy(True, 1e-6, 1e-9)


def config(block_q=4, block_n=64, num_warps=4, num_stages=3, splits=1) -> Config:
    """An indexer config, by default a good one."""
    return Config.of("triton", block_q=block_q, block_n=block_n, num_warps=num_warps, num_stages=num_stages, splits=splits)


def landscape(choice: Config) -> float:
    """Microseconds with one optimum, at block_q 2, block_n 128, num_warps 4, num_stages 4, splits 2."""
    best = {"block_q": 2, "block_n": 128, "num_warps": 4, "num_stages": 4, "splits": 2}
    return 100 * math.prod(1 + 0.15 * abs(math.log2(choice[name] / value)) for name, value in best.items())


def timed(microseconds: float, spread: float = 0.001) -> Outcome:
    """An OK outcome."""
    timing = Timing(microseconds, microseconds * (1 - spread), microseconds * (1 + spread), 5)
    return Outcome(Kind.OK, timing, COLD, PASSED, smem=1024)


def open_study(folder: Path, **changes) -> Study:
    """A study of the indexer, with some arguments changed."""
    options = {"method": "measured", "trials": 40, "seeds": [DEFAULT], **changes}
    return Study(options.pop("space", SPACE), options.pop("case", CASE), folder, **options)


class InstantEvaluator(Evaluator):
    """Judges by the landscape at once; ``judge`` may be anything else."""

    method, search_share, measures, free = "measured", 0.8, False, False

    def __init__(self, judge=lambda task: timed(landscape(task.candidate.config)), seconds: float = 0.1) -> None:
        super().__init__(SimpleNamespace(size=2, cancel=lambda: None, poll=lambda: None, results={}, seconds={}))
        self.judge, self.seconds = judge, seconds
        self.judged: list[Task] = []

    def submit(self, study, problem, candidate) -> None:
        self._ready.append(Task(study, problem, candidate, charged=True))

    def _advance(self) -> list[Done]:
        ready, self._ready = self._ready, []
        self.judged += ready
        return [Done(task, self.judge(task), self.seconds) for task in ready]


# Jobs of worker processes: module-level functions that a spawned child imports by name.


def compile_quickly(rendered, gpu) -> Built:
    """A build without a compiler; a block_n of 256 does not compile, hangs or kills, by its number of stages."""
    if "BLOCK_N = tl.constexpr(256)" in rendered.text:
        stages = rendered.text.split("STAGES = tl.constexpr(")[1][0]
        {"2": _raise, "3": _hang, "4": _die}.get(stages, lambda: None)()
    folder = Path(os.environ["DSA_CACHE_DIR"]) / rendered.sha[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return Built(rendered, gpu, folder, {"indexer": Resources(128, 0, 1024, 128)})


def prepare(problem, backend) -> None:
    """Nothing to prepare."""


def evaluate(problem, entrant, best_us) -> Outcome:
    """Misbehaves by the number of splits where block_q is 1, else the landscape's time."""
    if entrant.config["block_q"] == 1:
        {1: _raise, 2: _hang, 4: _die, 8: _poison}[entrant.config["splits"]]()
    return Outcome(Kind.OK, timed(landscape(entrant.config)).timing, COLD, PASSED, smem=1024)


def final(problem, entrants, limit_s) -> list[Measured]:
    """The landscape's times, as a final would give them."""
    return [Measured(timed(landscape(entrant.config)).timing, COLD, 1) for entrant in entrants]


def recheck(problem, entrant) -> Accuracy:
    """Always right."""
    return PASSED


def prepare_badly(problem, backend) -> None:
    """A problem whose inputs do not fit the GPU."""
    raise MemoryError("no room for the inputs")


def evaluate_slowly(problem, entrant, best_us) -> Outcome:
    """Long enough to be interrupted."""
    time.sleep(0.1)
    return evaluate(problem, entrant, best_us)


FAKE = Jobs(prepare, evaluate, final, recheck)


def _raise() -> None:
    raise RuntimeError("out of resource: shared memory")


def _poison() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _hang() -> None:
    time.sleep(600)


def _die() -> None:
    os._exit(11)
