"""How long nvcc takes for each CUDA C++ text that models call: processor seconds, which other work does not lengthen.

    python scripts/compile_times.py [--preset deepseek-v3.2 --preset glm-5-tp8] [--op attention] [--gpu H200] [--processes 8]

A text counts once, whichever models share it. Nothing is taken from the build cache, and nothing is put there. Exit status: 1
where a text takes longer than ``--most`` seconds, or there is none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen.command import verification  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from dsa_codegen.kernels import backends  # noqa: E402
from dsa_codegen.kernels.render import Rendered, render  # noqa: E402
from dsa_codegen.problem.presets import preset  # noqa: E402

MODELS = ("deepseek-v3.2", "deepseek-v3.2-tp8", "glm-5", "glm-5-tp8", "deepseek-v4-flash", "deepseek-v4-pro")


@dataclass(frozen=True)
class Timed:
    """What one text took."""

    op: str
    module: str
    seconds: float
    """Of processors, nvcc's parts and the assembler's together; they run one after the other."""


def texts(models: Iterable[str], names: Sequence[str], gpu: Gpu) -> dict[str, tuple[str, Rendered]]:
    """Operation and text by hash: what the models' calls have by default or from records, every option of theirs."""
    found = {}
    for model in map(preset, models):
        for subject in verification.subjects(model, gpu, names):
            if subject.config.backend == "cuda":
                text = render(subject.op, subject.spec, subject.config)
                found[text.sha] = (subject.op.name, text)
    return found


def compiled(work: tuple[str, Rendered, Gpu]) -> Timed:
    """Compile one text in a folder of its own."""
    op, text, gpu = work
    before = _children()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{text.module_name}.py"
        source.write_text(text.text)
        backends.get(text.backend).compile(source, gpu, Path(folder))
    return Timed(op, text.module_name, _children() - before)


def _children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def table(timed: Sequence[Timed]) -> list[str]:
    """By operation: texts, median and most."""
    lines = [f"{'operation':<18}{'texts':>6}{'median s':>10}{'most s':>8}"]
    for op in sorted({each.op for each in timed}):
        seconds = [each.seconds for each in timed if each.op == op]
        lines.append(f"{op:<18}{len(seconds):>6}{statistics.median(seconds):>10.1f}{max(seconds):>8.1f}")
    return lines


def main() -> int:
    """Compile, print the table and the longest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help=f"by default {', '.join(MODELS)}")
    parser.add_argument("--op", action="append", default=[], help="by default all that have CUDA C++")
    parser.add_argument("--gpu", default="H200", help="whose architecture is compiled for")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="compilers that run at once")
    parser.add_argument("--most", type=float, default=10.0, help="seconds that a text may take")
    asked = parser.parse_args()
    gpu = resolve(asked.gpu)
    work = [(op, text, gpu) for op, text in texts(asked.preset or MODELS, asked.op, gpu).values()]
    if not work:
        print("nothing of that is called in CUDA C++")
        return 1
    with multiprocessing.get_context("fork").Pool(asked.processes, maxtasksperchild=8) as pool:
        timed = sorted(pool.imap_unordered(compiled, work), key=lambda each: -each.seconds)
    print("\n".join(table(timed)))
    print("longest:", ", ".join(f"{each.module} {each.seconds:.1f}" for each in timed[:3]))
    return 1 if timed[0].seconds > asked.most else 0


if __name__ == "__main__":
    sys.exit(main())
