"""Compile the plain Triton templates of every operation for AMD's GPUs, without one, and write what came of it to docs/amd.md.

    python scripts/amd_targets.py [--target gfx942 --target gfx950] [--op attention …] [--seconds 120]

Nothing here runs on AMD: there is no launcher, no record and no measurement. It says which kernels could be the start of a
port: those that Triton's HIP backend compiles within the block's local memory, with a config that an NVIDIA GPU of that much
memory would get. Inline assembly of NVIDIA's is left out (``dequantize: cast``).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import ops  # noqa: E402
from dsa_codegen.errors import NoConfig  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from dsa_codegen.kernels.render import installed_triton, render  # noqa: E402
from dsa_codegen.problem import presets  # noqa: E402
from dsa_codegen.problem.op import Config, Op  # noqa: E402
from dsa_codegen.problem.values import Spec  # noqa: E402

PAGE = ROOT / "docs" / "amd.md"
LOCAL_MEMORY = {"gfx942": 65536, "gfx950": 163840}
"""Bytes that a block may have: MI300's, MI350's."""
WAVE = 64
MODELS = ("deepseek-v3.2", "glm-5.3-flash", "minimax-m3")
"""The first of them that calls an operation states its spec."""
FURTHER = {
    "attention": ("deepseek-v4-flash", "ax-k2"),
    "attention_gqa": ("qwen4-exp",),
    "attention_paged": ("deepseek-v3.2-bf16", "deepseek-v4-flash", "deepseek-v4.1", "ax-k2", "hy4-tp8"),
    "indexer": ("hy4",),
    "indexer_paged": ("hy4",),
}
"""Other models whose shapes another text serves."""
Row = tuple[str, str, str, str]
"""(operation, model, target, what came of it)."""


def compiled(text: str, name: str, target: str) -> int:
    """Compile every kernel of a rendered module; the most local memory that one takes."""
    import triton
    from triton.backends.compiler import GPUTarget

    from dsa_codegen.kernels.backends.base import import_module
    from dsa_codegen.kernels.backends.triton import BACKEND

    with tempfile.TemporaryDirectory(prefix="dsa-amd-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        source = Path(folder) / f"{name}.py"
        source.write_text(text)
        module = import_module(source)
        most = 0
        for kernel in module.SIGNATURES:
            options = {"enable_fp_fusion": True} | module.OPTIONS[kernel]
            made: Any = triton.compile(BACKEND._source(module, kernel), target=GPUTarget("hip", target, WAVE), options=options)
            most = max(most, made.metadata.shared)
        return most


def subject(op: Op, model: str, target: str) -> tuple[Spec, Config]:
    """The model's first spec, and the config that an NVIDIA GPU without matrix instructions of its own generation would get."""
    ada = resolve("L40S")
    gpu = dataclasses.replace(ada, smem_per_block=LOCAL_MEMORY[target])
    spec = op.specs(presets.preset(model))[0]
    try:
        return spec, _portable(op, spec, gpu)
    except NoConfig:
        return spec, _portable(op, spec, ada)  # it will be told that it does not fit


def models(op: Op) -> list[str]:
    """The first model that calls an operation, and those with shapes of their own."""
    first = [name for name in MODELS if op.specs(presets.preset(name))][:1]
    return [*first, *FURTHER.get(op.name, ())]


def _portable(op: Op, spec: Spec, gpu: Gpu) -> Config:
    config = op.default_config(spec, op.workloads(spec)[0].sizes, gpu, "triton")
    return config.replace(dequantize="cast") if "dequantize" in config.to_dict() else config


def rows(targets: list[str], names: list[str], seconds: float) -> Iterator[Row]:
    """One for each operation, model and target, each compiled by a process of its own, which may take so much CPU time."""
    able = [op for op in ops.all_ops().values() if "triton" in op.backends and op.name in (names or ops.all_ops())]
    wanted = [(op, model) for op in able for model in models(op)]
    for (op, model), target in itertools.product(wanted, targets):
        command = [sys.executable, __file__, "--one", op.name, "--model", model, "--target", target]
        done = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True)
        if done.returncode == -signal.SIGXCPU:
            yield op.name, model, target, f"not within {seconds:.0f} s"
            continue
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it crashed"]
        yield op.name, model, target, said[-1][:160]


def one(name: str, model: str, target: str) -> str:
    """What came of an operation: the local memory that its hungriest kernel takes."""
    op = ops.get(name)
    spec, config = subject(op, model, target)
    rendered = render(op, spec, config)
    taken, limit = compiled(rendered.text, rendered.module_name, target), LOCAL_MEMORY[target]
    return f"{taken} B" if taken <= limit else f"compiles, but takes {taken} of {limit} B"


def page(found: list[Row], targets: list[str]) -> str:
    """docs/amd.md."""
    by_name: dict[tuple[str, str], dict[str, str]] = {}
    for name, model, target, result in found:
        by_name.setdefault((name, model), {})[target] = result
    of_blocks = ", ".join(f"{LOCAL_MEMORY[target]} B on {target}" for target in targets)
    lines = [
        "# AMD",
        "",
        "Nothing of this package runs on AMD's GPUs: there is no launcher, no record, no measurement. What can be said without",
        "one is which of the plain Triton templates Triton's HIP backend compiles, and how much local memory they take of what",
        f"a block may have ({of_blocks}). `python scripts/amd_targets.py` writes this page; here it was",
        f"Triton {installed_triton()}, and the first spec of each model that is named.",
        "",
        f"| operation | model | {' | '.join(targets)} |",
        f"| --- | --- | {' | '.join('---' for _ in targets)} |",
        *(
            f"| `{name}` | `{model}` | {' | '.join(of.get(target, 'not tried') for target in targets)} |"
            for (name, model), of in by_name.items()
        ),
        "",
        "gfx942 has e4m3 of another kind (another bias): conversions are emulated, and take compilers long. Templates in",
        "Gluon, TileLang and CUDA C++ are Hopper's.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=LOCAL_MEMORY)
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--one", metavar="OP", help="compile this one, here")
    parser.add_argument("--model", default=MODELS[0], help="of that one")
    asked = parser.parse_args()
    if asked.one:
        resource.setrlimit(resource.RLIMIT_CPU, (int(asked.seconds), int(asked.seconds) + 5))
        print(one(asked.one, asked.model, asked.target[0]))
        return 0
    targets = asked.target or list(LOCAL_MEMORY)
    found = []
    for row in rows(targets, asked.op, asked.seconds):
        found.append(row)
        print(*row, sep="  ", flush=True)
    if not asked.op:
        PAGE.write_text(page(found, targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
