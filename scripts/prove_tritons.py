"""Prove that kernels of newer Tritons are right and as fast, on a GPU machine that has one Triton: they are built elsewhere.

    python scripts/prove_tritons.py build OUT --gpu H100 [--preset tiny --preset deepseek-v3.2]
    python scripts/prove_tritons.py check OUT_A OUT_B … [--json FILE]

``build`` needs no GPU: it compiles, by the Triton of its environment, every default and every record of the models that Triton
compiles, into the folder OUT. ``check`` loads such folders through the driver alone, whatever Triton is installed, verifies
every kernel (fresh random inputs, poisoned outputs, the plain PyTorch reference) and times the folders' kernels in turns, as
ratios to those of the first folder. It fails where a kernel is wrong; it names those that are over 3 % slower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import gpu as gpus  # noqa: E402
from dsa_codegen import ops  # noqa: E402
from dsa_codegen.command import verification  # noqa: E402
from dsa_codegen.errors import BuildError  # noqa: E402
from dsa_codegen.kernels import backends  # noqa: E402
from dsa_codegen.kernels.build import build, build_all  # noqa: E402
from dsa_codegen.kernels.render import installed_triton, render  # noqa: E402
from dsa_codegen.kernels.variant import Variant  # noqa: E402
from dsa_codegen.ops.needs import needs  # noqa: E402
from dsa_codegen.problem import presets  # noqa: E402
from dsa_codegen.proof.measure import input_sets, measure  # noqa: E402
from dsa_codegen.proof.timing import Policy  # noqa: E402
from dsa_codegen.proof.verify import verify  # noqa: E402

BY_TRITON = ("triton", "gluon")
TOLERATED = 1.03
QUICK = Policy(rounds=7, warmup_ms=5.0)
MODELS = ("tiny", "deepseek-v3.2")
Kernel = dict[str, Any]


def subjects(models: list[str], gpu: gpus.Gpu) -> Iterator[verification.Subject]:
    """What the models' own specs are served by or fall back to; no two of one text."""
    seen = set()
    for name in models:
        model = presets.preset(name)
        wanted = {(need.op.name, need.spec) for need in needs(model, (), gpu)}
        for subject in verification.subjects(model, gpu):
            if subject.config.backend not in BY_TRITON or (subject.op.name, subject.spec) not in wanted:
                continue
            sha = render(subject.op, subject.spec, subject.config).sha
            if sha not in seen:
                seen.add(sha)
                yield subject


def build_into(out: Path, gpu: gpus.Gpu, models: list[str]) -> None:
    """Compile, and lay one folder a kernel beside ``kernels.json``."""
    found = list(subjects(models, gpu))
    print(f"{len(found)} kernels by Triton {installed_triton()} for {gpu.id} …", flush=True)
    build_all((render(each.op, each.spec, each.config) for each in found), gpu)
    out.mkdir(parents=True)
    kernels: list[Kernel] = []
    for each in found:
        try:
            built = build(render(each.op, each.spec, each.config), gpu)
        except BuildError as error:
            kernels.append(_kernel(each) | {"error": str(error)})
            continue
        shutil.copytree(built.folder, out / built.folder.name)
        spills = max(kernel.spills for kernel in built.resources.values())
        kernels.append(_kernel(each) | {"build": built.folder.name, "source": built.source.name, "spills": spills})
    (out / "kernels.json").write_text(json.dumps({"triton": installed_triton(), "kernels": kernels}, indent=1))
    print(f"{sum('error' in kernel for kernel in kernels)} did not build")


def _kernel(each: verification.Subject) -> Kernel:
    config = {"backend": each.config.backend, "config": each.config.to_dict()}
    return {"op": each.op.name, "spec": each.spec.to_dict(), **config}


def check(folders: list[Path]) -> list[Kernel]:
    """Verify and time what the folders hold, on the current GPU: one row a kernel, with a ratio for each folder."""
    gpu = gpus.detect()
    if gpu is None:
        raise SystemExit("check needs a GPU")
    held = {}
    for folder in folders:
        index = json.loads((folder / "kernels.json").read_text())
        held[index["triton"]] = {_identity(each): (folder, each) for each in index["kernels"]}
    first = next(iter(held.values()))
    rows = []
    for identity in first:
        rows.append(_row(identity, {triton: found.get(identity) for triton, found in held.items()}, gpu))
        print(_line(rows[-1]), flush=True)
    return rows


def _identity(kernel: Kernel) -> str:
    return json.dumps([kernel[name] for name in ("op", "spec", "backend", "config")], sort_keys=True)


def _row(identity: str, found: dict[str, tuple[Path, Kernel] | None], gpu: gpus.Gpu) -> Kernel:
    name, spec_values, backend, config_values = json.loads(identity)
    op = ops.get(name)
    spec, config = op.spec_type.from_dict(spec_values), op.config(backend, config_values)
    row: Kernel = {"op": name, "backend": backend, "spec": spec_values, "config": config_values, "wrong": {}}
    variants = {}
    for triton, held in found.items():
        if held is None or "error" in held[1]:
            row["wrong"][triton] = "did not build" if held else "not there"
            continue
        folder, kernel = held
        out = folder / kernel["build"]
        variants[triton] = Variant(op, spec, config, gpu, backends.get(backend).load_ahead(out / kernel["source"], gpu, out))
        for case in op.cases_for(spec, config):
            accuracy = verify(variants[triton], case, "cuda", repeats=3)
            if not accuracy.passed:
                row["wrong"][triton] = f"{case.id}: {accuracy.detail}"
    row |= _times(variants, _largest(op, spec, config), gpu)
    row["spills"] = {triton: held[1].get("spills") for triton, held in found.items() if held}
    return row


def _largest(op: Any, spec: Any, config: Any) -> Any:
    """A workload of some size that the config reaches: what a launch costs is not what is compared."""
    return op.within_reach(spec, config, list(op.workloads(spec))[-1])


def _times(variants: dict[str, Variant], case: Any, gpu: gpus.Gpu) -> Kernel:
    """Median microseconds by Triton."""
    some = next(iter(variants.values()))
    sets = input_sets(some.op, some.spec, case, gpu)
    taken = measure(list(variants.values()), sets, QUICK, limit_s=0.3)
    return {"case": case.id, "us": {triton: each.timing.median for triton, each in zip(variants, taken, strict=True)}}


def _line(row: Kernel) -> str:
    times = list(row["us"].items())
    ratios = " ".join(f"{triton} {time:.1f} us ({time / times[0][1]:.3f})" for triton, time in times)
    return f"{row['op']:16} {row['backend']:7} {row['case'][:24]:24} {ratios} {row['wrong'] or ''}"


def report(rows: list[Kernel]) -> int:
    """Print what the rows say together; 1 where a kernel is wrong."""
    tritons = list(rows[0]["us"])
    for triton in tritons[1:]:
        ratios = [row["us"][triton] / row["us"][tritons[0]] for row in rows if {triton, tritons[0]} <= set(row["us"])]
        slow = sum(ratio > TOLERATED for ratio in ratios)
        print(f"{triton}: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}, {slow} of {len(ratios)} over 3 %")
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} kernels, {len(wrong)} wrong")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("out", type=Path)
    building.add_argument("--gpu", default="H100")
    building.add_argument("--preset", action="append", choices=presets.names())
    checking = commands.add_parser("check")
    checking.add_argument("folders", type=Path, nargs="+")
    checking.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.command == "build":
        build_into(asked.out, gpus.resolve(asked.gpu), asked.preset or list(MODELS))
        return 0
    rows = check(asked.folders)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    return report(rows)


if __name__ == "__main__":
    sys.exit(main())
