"""A tuning run that is killed with -9 at random moments and started again: ``killed.py KIND FOLDER TIMES SECONDS SEED``.

The runs are forks of one process that has imported everything: the moments fall into their work, not into imports. KIND is
"fake" (no kernel runs, the worker processes are real) or "planted" (``planted``'s kernels on the GPU that is here).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

TRIALS = 40


def note(*facts: object) -> None:
    """A line of what the worker processes do, which no kill tears."""
    line = " ".join(map(str, facts)) + "\n"
    with open(os.environ["KILLED_LOG"], "ab", buffering=0) as log:
        log.write(line.encode())


def evaluate(problem, entrant, best_us):
    """The job of the fake: noted, and long enough to be interrupted."""
    import tune_jobs

    note(os.getpid(), entrant.config)
    time.sleep(0.03)
    return tune_jobs.timed(tune_jobs.landscape(entrant.config))


def planted_evaluate(problem, entrant, best_us):
    """The job of the GPU, noted."""
    import planted

    note(os.getpid(), entrant.config)
    return planted.evaluate(problem, entrant, best_us)


def fake(folder: Path):
    """Tune the toy operation with worker processes that compile and run nothing."""
    import dataclasses
    import functools

    from dsa_codegen.tune import run as room
    from dsa_codegen.tune.on_gpu import GpuEvaluator
    from dsa_codegen.tune.plan import Budget
    from dsa_codegen.tune.pool import CompilePool

    import tune_jobs
    from tune_support import CASE, FAKE, OP, SPEC

    type(OP).workloads = lambda self, spec: [CASE]
    here = sys.modules[evaluate.__module__]
    room.GpuEvaluator = functools.partial(GpuEvaluator, table=dataclasses.replace(FAKE, evaluate=here.evaluate))
    room.CompilePool = lambda *args, **how: CompilePool(*args, **{**how, "compile": tune_jobs.compile_well})
    from support import H200

    options = {"budget": Budget(3000.0, TRIALS), "state": folder / ".tune", "processes": 1}
    return room.tune([(OP, SPEC)], H200, folder / "tuned", **options)


def on_gpu(folder: Path):
    """Tune the planted operation, its good candidates and its bad ones."""
    import dataclasses

    import planted

    planted.JOBS = dataclasses.replace(planted.JOBS, evaluate=planted_evaluate)
    return planted.tune(folder, hang_s=3.0, wall_s=3000.0)


def once(kind: str, folder: Path) -> None:
    """A whole run, and what it leaves, as a line of JSON in ``folder/report``."""
    report = {"fake": fake, "planted": on_gpu}[kind](folder)
    (study,) = report.studies
    told = {"evaluated": study.evaluated, "counts": {kind.value: n for kind, n in study.counts.items()}}
    told |= {"records": [dict(record.config) for record in report.records], "elapsed_s": report.elapsed_s}
    (folder / "report").write_text(json.dumps(told))


def lines(folder: Path) -> int:
    """Candidates that were begun so far, in all runs."""
    log = folder / "log"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def start(kind: str, folder: Path) -> int:
    """A fork that does one run; its process id."""
    process = os.fork()
    if not process:
        code = 1
        try:
            once(kind, folder)
            code = 0
        finally:
            os._exit(code)
    return process


def kill(process: int, folder: Path, count: int, later: float) -> None:
    """Kill a run so many seconds after the count of candidates was reached; one that ends before is as well."""
    while lines(folder) < count:
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.005)
    time.sleep(later)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def main() -> None:
    """See the module's first lines; the last run is let finish."""
    kind, folder, (times, seconds, seed) = (
        sys.argv[1],
        Path(sys.argv[2]),
        (int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])),
    )
    os.environ.update(DSA_CACHE_DIR=str(folder / "cache"), KILLED_LOG=str(folder / "log"), PYTORCH_NVML_BASED_CUDA_CHECK="1")
    from dsa_codegen.tune import run  # noqa: F401

    moment = random.Random(seed)
    for _ in range(times):
        further = moment.choice((0, 0, 0, 1, 2, 5))  # killed in its first moments, or behind so many candidates
        kill(start(kind, folder), folder, lines(folder) + further, moment.uniform(0.0, seconds if further else 15 * seconds))
    done = os.waitpid(start(kind, folder), 0)[1]
    sys.exit(os.waitstatus_to_exitcode(done))
