"""Prove that kernels serve the whole space of shapes: random specs, verified and timed on a GPU, or compiled without one.

    python scripts/prove_shapes.py [--triton 28 --gluon 16 --tilelang 16 --cuda 16] [--op NAME] [--any-config]
                                   [--seed 1] [--gpu H100] [--workers 8] [--seconds 600] [--json FILE]

On a GPU every random spec runs its operation's small cases and one long one (fresh inputs, poisoned outputs, the plain PyTorch
reference, repeats bit for bit). Without one, or with ``--gpu``, specs are compiled for it. It prints a table by backend and
fails where a kernel is wrong; specs that the seconds did not suffice for are counted as left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import gpu as gpus  # noqa: E402
from dsa_codegen.problem.op import Config, Op  # noqa: E402
from dsa_codegen.problem.values import Spec  # noqa: E402
from dsa_codegen.proof.crew import at_once  # noqa: E402
from dsa_codegen.proof.random_specs import checked, sample  # noqa: E402

COUNTS = {"triton": 28, "gluon": 16, "tilelang": 16, "cuda": 16}
Row = dict[str, Any]
_KEEP_EVERY = 10  # specs
Subject = tuple[Op, Spec, Config]


def row_of(subject: Subject, outcome: Any) -> Row:
    """What came of one spec; an error is what is wrong with it."""
    op, spec, config = subject
    named = {"op": op.name, "backend": config.backend, "spec": spec.to_dict(), "config": config.to_dict()}
    return {**named, **(outcome if isinstance(outcome, dict) else {"wrong": f"{type(outcome).__name__}: {outcome}"[:400]})}


def tell(row: Row) -> None:
    """A line of each spec as it ends."""
    state = f"WRONG {row['wrong']}\n  {row['spec']} {row['config']}" if row["wrong"] else f"spills {row['spills']}"
    print(f"{row['op']:18} {row['backend']:8} {row.get('seconds', 0):5.1f} s  {state}", flush=True)


def keep(file: Path | None, rows: list[Row]) -> None:
    """Write the ``--json``, where one is wanted."""
    if file:
        file.write_text(json.dumps(rows, indent=1))


def table(rows: list[Row]) -> str:
    """One line a backend."""
    lines = [f"{'backend':9} {'specs':>5} {'right':>5} {'cases':>5} {'spill':>5}  operations"]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        right, cases = sum(not row["wrong"] for row in own), sum(row.get("cases", 0) for row in own)
        spilling, names = sum(row.get("spills", 0) > 0 for row in own), sorted({row["op"] for row in own})
        lines.append(f"{backend:9} {len(own):5} {right:5} {cases:5} {spilling:5}  {' '.join(names)}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for backend, count in COUNTS.items():
        parser.add_argument(f"--{backend}", type=int, default=count, metavar="SPECS")
    parser.add_argument("--op", help="specs of this operation alone")
    parser.add_argument("--any-config", action="store_true", help="a random config too, in place of the default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu")
    parser.add_argument("--workers", type=int, default=8, help="processes that build and run at once")
    parser.add_argument("--seconds", type=float, default=600.0, help="for it all")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def drawn(asked: argparse.Namespace, gpu: gpus.Gpu, backend: str) -> Iterator[Subject]:
    """The specs of one backend that were asked for."""
    return sample(getattr(asked, backend), asked.seed, gpu, backend, asked.op, asked.any_config)


def main() -> int:
    asked, start = arguments(), time.monotonic()
    found = None if asked.gpu else gpus.detect()
    gpu = found or gpus.resolve(asked.gpu or "H100")
    # nvcc's specs first: they take longest, and none is left when the other workers are done
    subjects = [each for backend in reversed(COUNTS) for each in drawn(asked, gpu, backend)]
    rows: list[Row] = []

    def told(number: int, outcome: Any) -> None:
        rows.append(row_of(subjects[number], outcome))
        tell(rows[-1])
        if len(rows) % _KEEP_EVERY == 0:  # whoever ends this run early has what it found
            keep(asked.json, rows)

    calls = [(op.name, spec, config, gpu, found is not None) for op, spec, config in subjects]
    at_once(checked, calls, asked.workers, seconds=asked.seconds - (time.monotonic() - start), told=told)
    keep(asked.json, rows)
    print(table(rows))
    seconds, left = time.monotonic() - start, len(subjects) - len(rows)
    print(f"{len(rows)} random specs {'verified on' if found else 'compiled for'} {gpu.id} in {seconds:.0f} s, {left} left")
    return int(left > 0 or any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
