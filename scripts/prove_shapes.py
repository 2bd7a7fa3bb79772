"""Prove that kernels serve the whole space of shapes: random specs, verified and timed on a GPU, or compiled without one.

    python scripts/prove_shapes.py [--triton 28 --gluon 16 --tilelang 16 --cuda 16] [--seed 1] [--gpu H100] [--json FILE]

On a GPU every random spec runs its operation's small cases and one long one (fresh inputs, poisoned outputs, the plain PyTorch
reference, repeats bit for bit). Without one, or with ``--gpu``, specs are compiled for it. It prints a table by backend and
fails where a kernel is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import gpu as gpus  # noqa: E402
from dsa_codegen.errors import DsaError  # noqa: E402
from dsa_codegen.kernels.build import build, build_all  # noqa: E402
from dsa_codegen.kernels.render import render  # noqa: E402
from dsa_codegen.problem.op import Config, Op  # noqa: E402
from dsa_codegen.problem.values import Spec  # noqa: E402
from dsa_codegen.proof.random_specs import prove, sample  # noqa: E402
from dsa_codegen.worker import Worker  # noqa: E402

COUNTS = {"triton": 28, "gluon": 16, "tilelang": 16, "cuda": 16}
SECONDS = 60.0
Row = dict[str, Any]


def checked(op: Op, spec: Spec, config: Config, gpu: gpus.Gpu, worker: Worker | None) -> Row:
    """What came of one spec: compiled, and where there is a worker run on its GPU."""
    row: Row = {"op": op.name, "backend": config.backend, "spec": spec.to_dict(), "config": config.to_dict(), "wrong": ""}
    start = time.monotonic()
    try:
        used = build(render(op, spec, config), gpu).resources.values()
        row |= {"spills": max(usage.spills for usage in used), "smem": max(usage.smem for usage in used), "cases": 0}
        if row["smem"] > gpu.smem_per_block:
            row["wrong"] = f"{row['smem']} bytes of shared memory, {gpu.smem_per_block} allowed"
        elif worker is not None:
            row["cases"], row["wrong"] = worker.call(prove, op.name, spec, config, gpu, timeout=SECONDS)
    except DsaError as error:
        row["wrong"] = f"{type(error).__name__}: {error}"[:400]
        if worker is not None:
            worker.kill()  # its CUDA context may be poisoned
    row["seconds"] = time.monotonic() - start
    return row


def table(rows: list[Row]) -> str:
    """One line a backend."""
    lines = [f"{'backend':9} {'specs':>5} {'right':>5} {'cases':>5} {'spill':>5}  operations"]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        right, cases = sum(not row["wrong"] for row in own), sum(row.get("cases", 0) for row in own)
        spilling, names = sum(row.get("spills", 0) > 0 for row in own), sorted({row["op"] for row in own})
        lines.append(f"{backend:9} {len(own):5} {right:5} {cases:5} {spilling:5}  {' '.join(names)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for backend, count in COUNTS.items():
        parser.add_argument(f"--{backend}", type=int, default=count, metavar="SPECS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = None if asked.gpu else gpus.detect()
    gpu = found or gpus.resolve(asked.gpu or "H100")
    subjects = [each for backend in COUNTS for each in sample(getattr(asked, backend), asked.seed, gpu, backend)]
    start = time.monotonic()
    build_all((render(*each) for each in subjects), gpu)
    print(f"{len(subjects)} random specs built for {gpu.id} in {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    worker = None if found is None else Worker({})
    for each in subjects:
        rows.append(checked(*each, gpu, worker))
        row = rows[-1]
        state = f"WRONG {row['wrong']}\n  {row['spec']} {row['config']}" if row["wrong"] else f"spills {row['spills']}"
        print(f"{row['op']:18} {row['backend']:8} {row['seconds']:5.1f} s  {state}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
