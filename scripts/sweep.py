"""Measure every config of search spaces on the GPU at hand, and write the sweeps that ``cli.py tune --replay`` reads.

    python scripts/sweep.py --sweep select:cuda:rows64-columns32768-normal,rows1-columns32768-normal [--sweep …] --out FOLDER

A sweep names an operation, a backend and cases of one spec of the model (the first spec that has them all as workloads). A file
is written as soon as a case is done, and again after the next one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import ops  # noqa: E402
from dsa_codegen.errors import InputError  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from dsa_codegen.kernels import anatomy  # noqa: E402
from dsa_codegen.problem.op import Case, Op  # noqa: E402
from dsa_codegen.problem.presets import preset  # noqa: E402
from dsa_codegen.problem.values import Spec  # noqa: E402
from dsa_codegen.tune import sweeping  # noqa: E402
from dsa_codegen.tune.pool import CompilePool, cores  # noqa: E402
from dsa_codegen.tune.space import Space  # noqa: E402
from dsa_codegen.tune.sweep import Sweep  # noqa: E402


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="append", required=True, metavar="OP:BACKEND:CASE,CASE")
    parser.add_argument("--preset", default="deepseek-v3.2")
    parser.add_argument("--visits", type=int, default=sweeping.VISITS)
    parser.add_argument("--jobs", type=int, default=cores(spare=1))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    gpu, begun = resolve("auto"), time.monotonic()
    cache = Path(tempfile.mkdtemp(prefix="dsa-sweep-"))
    wanted = [_wanted(each, arguments.preset, gpu) for each in arguments.sweep]
    try:
        with CompilePool(gpu, cache, arguments.jobs, compile=anatomy.dissected, log=cache / "log") as pool:
            for space, cases in wanted:  # later ones are compiled while earlier ones are timed
                for candidate in sweeping.candidates(space.op, space, cases):
                    pool.request(candidate.rendered)
            for space, cases in wanted:
                _one(space, cases, pool, arguments, begun)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _wanted(text: str, model: str, gpu: Gpu) -> tuple[Space, list[Case]]:
    name, backend, case_ids = text.split(":")
    op = ops.get(name)
    spec, cases = _spec(op, model, case_ids.split(","))
    return Space(op, spec, backend, gpu), cases


def _one(space: Space, cases: Sequence[Case], pool: CompilePool, arguments: argparse.Namespace, begun: float) -> None:
    label = f"{space.op.name}-{space.backend}-{space.gpu.id}"

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s {label} {text}", flush=True)

    def keep(sweep: Sweep) -> None:
        sweep.write(arguments.out / f"{label}.json")
        last = sweep.cases[-1]
        timed = [time_us for number in range(len(sweep.entries)) if (time_us := last.time_us(number)) is not None]
        default_us = last.time_us(sweep.number[last.default]) if last.default in sweep.number else None
        tell(f"{last.case.id}: best {min(timed, default=0):.4g} µs, default {default_us}, {len(timed)} timed")

    sweeping.sweep(space.op, space.spec, cases, pool, space, visits=arguments.visits, tell=tell, keep=keep)


def _spec(op: Op, model: str, case_ids: Sequence[str]) -> tuple[Spec, list[Case]]:
    for spec in op.specs(preset(model)):
        known = {case.id: case for case in op.workloads(spec)}
        if set(case_ids) <= known.keys():
            return spec, [known[case_id] for case_id in case_ids]
    raise InputError("--sweep", ",".join(case_ids), f"workloads of one spec of {op.name}")


if __name__ == "__main__":
    main()
