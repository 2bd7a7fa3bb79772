"""A stand-in for the GPU: studies of the indexer whose candidates are judged by a landscape of times."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

from dsa_codegen.kernels.build import Built
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.problem.op import Accuracy, Case, Config
from dsa_codegen.proof.measure import Measured
from dsa_codegen.proof.timing import COLD
from dsa_codegen.records import files as records
from dsa_codegen.records.record import Record
from dsa_codegen.tune.evaluate import Done, Evaluator, Task
from dsa_codegen.tune.lane import Jobs
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.problem import Problem
from dsa_codegen.tune.space import Space
from dsa_codegen.tune.study import Study

import tune_jobs
from support import H200
from toy import OP
from tune_jobs import landscape, timed

SPEC = IndexerSpec(64, 128)
CASE = Case(IndexerSizes(4096, 32768), "causal")
PROBLEM = Problem(OP, SPEC, CASE, H200)
SPACE = Space(OP, SPEC, "triton", H200)
DEFAULT = OP.default_config(SPEC, CASE.sizes, H200)
TRIALS = 8
"""Of a whole run, where a test does not say another number."""
FAKE = Jobs(
    tune_jobs.prepare,
    tune_jobs.evaluate,
    tune_jobs.final,
    tune_jobs.recheck,
    tune_jobs.gate,
    tune_jobs.eager,
    tune_jobs.card,
    tune_jobs.load,
)


def config(block_q=4, block_n=64, num_warps=4, num_stages=3, splits=1) -> Config:
    """An indexer config, by default a good one."""
    return Config.of("triton", block_q=block_q, block_n=block_n, num_warps=num_warps, num_stages=num_stages, splits=splits)


def open_study(folder: Path, **changes) -> Study:
    """A study of the indexer, with some arguments changed."""
    options = {"method": "measured", "trials": 40, "seeds": [DEFAULT], **changes}
    return Study(options.pop("space", SPACE), options.pop("case", CASE), folder, **options)


def stored(folder: Path) -> tuple[Record, ...]:
    """The records of the indexer that a run has written below a folder."""
    return records.read(folder / "tuned" / "h200" / "indexer.json")


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, locks aside."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


class InstantEvaluator(Evaluator):
    """Judges by the landscape at once; ``judge`` may be anything else."""

    method, search_share, measures, free = "measured", 0.8, False, False

    def __init__(self, judge=lambda task: timed(landscape(task.candidate.config)), seconds: float = 0.1) -> None:
        super().__init__(
            SimpleNamespace(size=2, cancel=lambda: None, poll=lambda: None, results={}, seconds={}, busy_s=0.0, keep_only=len)
        )
        self.judge, self.seconds = judge, seconds
        self.judged: list[Task] = []

    def submit(self, study, problem, candidate) -> None:
        self._ready.append(Task(study, problem, candidate, charged=True))

    def _advance(self) -> list[Done]:
        ready, self._ready = self._ready, []
        self.judged += ready
        return [Done(task, self.judge(task), self.seconds) for task in ready]


class InstantGpu(InstantEvaluator):
    """As the GPU's evaluator, with finals and all, but in this process and by the landscape."""

    measures = True

    def __init__(self, judge=lambda task: timed(landscape(task.candidate.config)), folder: Path | None = None) -> None:
        super().__init__(judge)
        self.pool.request, self.pool.backlog = lambda rendered, first=False: True, 0
        self.folder = folder or Path(tempfile.mkdtemp())
        self.finals: list[list[Config]] = []
        self.refusals = 0
        """How many winners fail their last check."""
        self.wrong: set[Config] = set()
        """What does not pass the gate."""
        self.trouble = ""
        """Why no problem can be set up."""

    def is_built(self, candidate) -> bool:
        return True

    def built(self, candidate) -> Built:
        folder = self.folder / candidate.rendered.sha[:32]
        folder.mkdir(parents=True, exist_ok=True)
        return Built(candidate.rendered, H200, folder, {})

    def compiled(self, candidate) -> bool:
        return True

    def set_up(self, problem, backend) -> str:
        return self.trouble

    def gate(self, problem, candidate) -> Outcome:
        passed = Outcome(Kind.OK, accuracy=tune_jobs.PASSED, smem=1024)
        return Outcome(Kind.MISMATCH, detail="3 values outside tolerance") if candidate.config in self.wrong else passed

    def final(self, problem, candidates, limit_s):
        self.finals.append([candidate.config for candidate in candidates])
        return [Measured(timed(landscape(candidate.config)).timing, COLD, 1) for candidate in candidates]

    def recheck(self, problem, candidate) -> Accuracy:
        self.refusals -= 1
        return Accuracy(self.refusals < 0, 0.0, 0.0, "a repeat differs bitwise")
