"""A tiny operation some of whose candidates misbehave on purpose: they hang, crash, write out of bounds, are wrong but fast,
exhaust memory, or poison their context. The pipeline is the real one; without a GPU Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from dsa_codegen import gpu as gpus
from dsa_codegen import paths
from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels.backends import Resources
from dsa_codegen.kernels.build import Built, build
from dsa_codegen.problem.compare import equal
from dsa_codegen.problem.op import Case, Config, Cost, Launch, Op, Parameter
from dsa_codegen.problem.values import Sizes, Spec
from dsa_codegen.proof import measure as measuring
from dsa_codegen.proof.stopwatch import Stopwatch
from dsa_codegen.tune import again as repeating
from dsa_codegen.tune import jobs, lane
from dsa_codegen.tune import run as room
from dsa_codegen.tune.lane import Jobs
from dsa_codegen.tune.on_gpu import GpuEvaluator
from dsa_codegen.tune.outcome import Kind
from dsa_codegen.tune.plan import Budget
from dsa_codegen.tune.pool import CompilePool

EXPECTED = {
    "hang": Kind.RUN_TIMEOUT,
    "crash": Kind.WORKER_DIED,
    "bounds": Kind.OUT_OF_BOUNDS,
    "wrong": Kind.MISMATCH,
    "memory": Kind.OUT_OF_MEMORY,
    "poison": Kind.CONTEXT_LOST,
}
"""What each fault is to be counted as."""
# What the run saw, in each of its processes: the compilers' see no GPU.
HERE = os.environ.setdefault("PLANTED_ON", "cuda" if torch.cuda.is_available() else "cpu") == "cuda"
paths.templates = lambda: Path(__file__).parent / "planted_templates"  # in the run and in each of its processes


@dataclass(frozen=True)
class PlantedSpec(Spec):
    """Nothing changes the code but the config."""

    scale: int = 2


@dataclass(frozen=True)
class PlantedSizes(Sizes):
    """Elements."""

    n: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"n": (1 << 16,)}


class Planted(Op):
    """Doubles numbers, or is told not to."""

    name, summary, function = "planted", "Twice the source, or what a fault makes of it.", "planted"
    schema = "(Tensor source) -> Tensor"
    spec_type, sizes_type = PlantedSpec, PlantedSizes
    backends = ("triton",)

    def specs_of(self, model):
        return (PlantedSpec(),)

    def bind(self, *args):
        raise NotImplementedError

    def inputs(self, spec, case, draw):
        return {"source": draw.normal(case.sizes.n)}

    def reference(self, spec, inputs):
        return {"doubled": inputs["source"] * 2}

    def allocate(self, spec, inputs):
        return {"doubled": torch.empty_like(inputs["source"])}

    def check(self, spec, inputs, outputs, reference):
        return equal("doubled", outputs["doubled"], reference["doubled"])

    def cost(self, spec, case):
        return Cost(case.sizes.n, 8 * case.sizes.n, "fp32")

    def cases(self, spec):
        return [Case(PlantedSizes(n)) for n in (300, 1)]

    def workloads(self, spec):
        return [Case(PlantedSizes(int(os.environ.get("PLANTED_N", "5000"))))]

    def parameters(self, backend):
        return (
            Parameter("fault", ("none", *EXPECTED), "what goes wrong"),
            Parameter("block", (128, 256, 512, 1024), "elements per program"),
            Parameter("num_warps", (4, 8), "warps per program"),
        )

    def constraints(self, spec, config, gpu) -> Iterable:
        from dsa_codegen.problem.op import Violation

        if config["fault"] != "none" and (config["block"], config["num_warps"]) != (1024, 8):
            yield Violation("fault", 1.0, "one candidate of each fault is enough")

    def guesses(self, spec, sizes, gpu):
        yield Config.of("triton", fault="none", block=256, num_warps=4)

    def derived(self, spec, config):
        return {}

    def launches(self, spec, config, inputs, outputs, gpu) -> Sequence[Launch]:
        source = inputs["source"]
        if config["fault"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if config["fault"] == "memory":
            torch.empty(1 << 50, dtype=torch.uint8, device=source.device)
        grid = (-(-source.numel() // config["block"]), 1, 1)
        return (Launch("double", grid, (source, outputs["doubled"], source.numel())),)


OP = Planted()


@dataclass(frozen=True)
class Interpreted(Built):
    """A build without a compiler."""

    def load(self):
        from dsa_codegen.kernels.backends.triton import interpreted

        kernels = interpreted(self.source)
        return {name: functools.partial(_launch, self.rendered.text, kernel) for name, kernel in kernels.items()}


_clock = 0.0
_poisoned = False


def _launch(text: str, kernel, grid, args) -> None:
    """A made-up time: small blocks take longer, half of the work half; and a context that stays poisoned."""
    global _clock, _poisoned
    _clock += (50.0 if "half of the work" in text else 100.0) + 10.0 * grid[0]
    _poisoned |= "terabytes" in text
    if _poisoned:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    time.sleep(float(os.environ.get("PLANTED_SECONDS", "0")))
    kernel(grid, args)


class Told(Stopwatch):
    """The made-up times."""

    def capture(self, calls):
        return lambda: [call() for call in calls]

    def time_us(self, run):
        before = _clock
        run()
        return _clock - before


def compiled(rendered, gpu) -> Built:
    """The compiler's job: the real one for the GPU that is here, else none."""
    if HERE:
        return build(rendered, gpu)
    folder = Path(os.environ["DSA_CACHE_DIR"]) / rendered.sha[:32]
    folder.mkdir(parents=True, exist_ok=True)
    built = Interpreted(rendered, gpu, folder, {"double": Resources(32, 0, 0, 128)})
    built.source.write_text(rendered.text)
    return built


def _on_cpu(job, *args):
    if not HERE:
        jobs.DEVICE, jobs._memory = "cpu", lambda: 1 << 34
        jobs.measure = functools.partial(measuring.measure, stopwatch=Told())
    return job(*args)


def prepare(*args):
    return _on_cpu(jobs.prepare, *args)


def evaluate(*args):
    return _on_cpu(jobs.evaluate, *args)


def final(*args):
    return _on_cpu(jobs.final, *args)


def recheck(*args):
    return _on_cpu(jobs.recheck, *args)


def gate(*args):
    return _on_cpu(jobs.gate, *args)


def eager(*args):
    return _on_cpu(jobs.eager, *args)


JOBS = Jobs(prepare, evaluate, final, recheck, gate, eager)


def arrange(hang_s: float) -> None:
    """Tune this operation from here on, giving a candidate so many seconds."""
    lane.PATIENT_SECONDS = hang_s
    lane.RUN_SECONDS = 8.0 if HERE else 60.0  # of a process's first candidate; the interpreter imports much
    for module in (room, repeating):
        module.GpuEvaluator = functools.partial(GpuEvaluator, table=JOBS)
        module.CompilePool = lambda *args, **how: CompilePool(*args, **{**how, "compile": compiled})
    repeating.all_ops = lambda: {OP.name: OP}
    if not HERE:
        os.environ["TRITON_INTERPRET"] = "1"


def target() -> Gpu:
    """The GPU that is here, or one that keeps its inputs small."""
    return gpus.detect() or dataclasses.replace(gpus.resolve("h200"), l2=1)


def tune(folder: Path, hang_s: float = 4.0, wall_s: float = 120.0, trials: int = 48, **options):
    """A whole run in a folder of its own; the report."""
    arrange(hang_s)
    os.environ["DSA_CACHE_DIR"] = str(folder / "cache")
    options.setdefault("processes", 1)
    budget = Budget(wall_s, trials)
    return room.tune([(OP, PlantedSpec())], target(), folder / "tuned", budget=budget, state=folder / ".tune", **options)


def main() -> None:
    """``planted FOLDER HANG_S WALL_S``: a line whenever the count of candidates changes, then the report as JSON."""
    seen = 0

    def tell(progress) -> None:
        nonlocal seen
        evaluated = sum(study.evaluated for study in progress.studies)
        if evaluated != seen:
            seen = evaluated
            print(seen, flush=True)

    hang_s, wall_s = map(float, sys.argv[2:4])
    report = tune(Path(sys.argv[1]), hang_s, wall_s, notify=tell)
    (study,) = report.studies
    print(
        json.dumps(
            {
                "counts": {kind.value: number for kind, number in study.counts.items()},
                "config": [dict(record.config) for record in report.records],
                "elapsed_s": report.elapsed_s,
                "failures": [dataclasses.asdict(failure) for failure in report.failures],
            }
        )
    )
