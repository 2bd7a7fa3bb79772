"""Run every operation and backend of small models under compute-sanitizer, in pieces that finish, several at once.

    python scripts/sanitize.py [--tool memcheck] [--op select] [--backend cuda] [--preset tiny] [--jobs 12] [--seconds 120]

Everything is built first, without the tool. A piece is a few cases of one operation and backend in a process of its
own, verified as ``cli.py verify`` does (the long ones under memcheck alone). Only this project's kernels are
looked at, torch's are not. Models are `tiny` and, for grouped queries, `tiny-gqa`; operations of training are among them.
Kernels in CUDA C++ are checked on the same models with 128 heads, too, and prefill attention's with 64 and a longer k, for
which they have other designs, on two SMs, where a block takes several queries. synccheck and racecheck look at barriers and
shared memory, memcheck at every address, every tensor in an allocation of its own.

Exit status: 0 where all pieces are clean, 1 where one is not or did not finish within its seconds. Reports: ``--out``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import operator
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dsa_codegen import ops, paths  # noqa: E402
from dsa_codegen.command import verification  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from dsa_codegen.kernels.build import Built, build  # noqa: E402
from dsa_codegen.kernels.render import render  # noqa: E402
from dsa_codegen.kernels.variant import Variant  # noqa: E402
from dsa_codegen.problem.op import Case  # noqa: E402
from dsa_codegen.problem.presets import Model, preset  # noqa: E402
from dsa_codegen.proof.verify import verify  # noqa: E402
from scripts import source_lines  # noqa: E402

MODELS = ("tiny", "tiny-gqa")
TOOLS = ("memcheck", "racecheck", "synccheck")  # the slowest first: no long piece is left when the others are done
TOGETHER = {"memcheck": 20, "racecheck": 40, "synccheck": 40}  # cases of a piece, about as long as the start of a process
LONG_TOPK = 1024  # eight pairs of tiles: enough to be cut in two
SMS = {"attention": 2}
"""On how many SMs an operation's kernels in CUDA C++ run under the tools that look at barriers: their blocks stay, and take
several queries of a case there, where on all SMs each would take one."""
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: .*?\()(\d+) error")
_RACE = re.compile(r"(?:Race reported between|Potential invalid __shared__ read) .*?(?=\n=========\s*\n|\Z)", re.DOTALL)
_PLACE = re.compile(r" in (\w+\.py):(\d+)")
ORDERED: dict[tuple[str, str], Sequence[source_lines.Group]] = {
    ("attention_paged", "gluon"): [("def attention_paged(", "gl.warp_specialize(", "per_row.")],
    ("indexer_paged", "gluon"): [("def indexer_paged(", "gl.warp_specialize(")],
    ("attention", "cuda"): [
        ("load16(from), pass)", "copy_rows(copy16)"),
        ("load4(base + AT_MASK + 8 * value_stage)", "store4(base + AT_MASK + 8 * stage, valid)"),
        ("load_transposed(rows, from", "(source + u * 128), real, policy)"),
        ("load16(columns", "load8(inverses", "store_float(pair", "store_float(base + AT_COLUMNS"),
        ("load4(base + AT_MASK + 8 * stage", "store4(base + AT_MASK + 8 * stage"),
        ("load_float(fact(AT_PEAKS", "load_float(base + AT_CHANGES", "publish(AT_PEAKS", "publish(AT_CHANGES"),
        ("load_float(fact(AT_TOTALS", "publish(AT_TOTALS"),
        ("load_float(at), load_float(at + 4)", "publish(AT_FACTORS"),
        ("load16(base + AT_GROWN", "store4(base + AT_GROWN"),
    ],
    ("select", "cuda"): [
        ("s.local_totals[",),
        ("s.warp_counts[",),
        ("s.block_count[",),
        ("s.mine[",),
        ("need -= s.found.", "found.above =", "found.bin =", "found.count =", "s.output_count = at"),
        ("load_remote",),
    ],
}
"""Groups of lines between which racecheck (2025.3) misses the order; a report of others than one group's is an error.

Triton tells its roles what to run through shared memory: the first warp group writes, all warps meet at ``barrier.sync 1``, the
others read, all meet again; a meeting is another instruction for other warps. ``per_row`` passes from one warp group to another
under an mbarrier that one thread arrives at behind a ``bar.sync`` of its group, and all of the other wait for. Both can be read
off the PTX.

In CUDA C++ the readers of a place are warps whose first lane arrives for all of them, and the gatherers wait for it before they
fill the place again. With few heads the warp has read the output that went through the place, and passed ``__syncwarp``. In a
cluster all lanes read a tile's mask at once, and its products, which the warp issues together, need what came of it; the first
lane arrives behind these. With FP8 products every place passes so, both ways and behind ``__syncwarp``: tiles, their scales and
masks by FULL and EMPTY, peaks by PEAKED, changes, sums and factors by WEIGHED; these are written anew when peaks of a later
tile came that who read them signals behind that. The tool sees the order of the thread that arrives only.

In clusters of the selection that keep scores in registers, some warps meet at a barrier of their own before all meet at
``__syncthreads``, which stands between the lines of each group; the tool reports them all the same (not where a block has no
such barrier). ``found`` is read together with the word before it, ``output_count``. No block ends before the others have read
its bins: it waits for a word from each, which that one sends behind its reads, or for the cluster's barrier. The tool sees the
latter only; with it these reports were gone, and a choice among 64K took 6.0 us instead of 5.6.
"""


@dataclass(frozen=True)
class Piece:
    """What one process checks with one tool: a share of the cases of an operation and backend."""

    tool: str
    op: str
    backend: str
    share: int
    shares: int

    @property
    def name(self) -> str:
        """As reports are called."""
        return f"{self.tool}-{self.op}-{self.backend}-{self.share + 1}of{self.shares}"


@dataclass(frozen=True)
class Outcome:
    """How a piece ended."""

    piece: Piece
    verdict: str
    """"clean", "clean but for …", "N errors", "timeout" or "failed"."""
    cases: int
    seconds: float


def sources(models: Sequence[str], gpu: Gpu, names: Sequence[str] = ()) -> list[verification.Subject]:
    """The models' rendered sources of the named operations (by default all, of training too), each once."""
    served = [name for name, op in ops.all_ops().items() if gpu.capability >= op.min_capability]
    found: dict[tuple[object, ...], verification.Subject] = {}
    for model in map(preset, models):
        for subject in sources_of(model, gpu, names or served):
            found.setdefault((subject.op.name, subject.spec, subject.config), subject)
    return list(found.values())


def sources_of(model: Model, gpu: Gpu, names: Sequence[str]) -> list[verification.Subject]:
    """A model's sources, and in CUDA C++, whose designs for many heads are others, those of 128 and of 64 heads."""
    own = verification.subjects(model, gpu, names)
    known = {(subject.op.name, subject.spec) for subject in own}
    wide = verification.subjects(replace(model, heads=128), gpu, names)
    long = verification.subjects(replace(model, heads=64, topk=LONG_TOPK), gpu, ["attention"]) if "attention" in names else []
    return [*own, *(each for each in of_backend([*wide, *long], "cuda") if (each.op.name, each.spec) not in known)]


def of_backend(subjects: Iterable[verification.Subject], backend: str) -> list[verification.Subject]:
    """Those of one backend."""
    return [subject for subject in subjects if subject.config.backend == backend]


def of(subjects: Iterable[verification.Subject], op: str, backend: str) -> list[verification.Subject]:
    """Those of one operation and backend."""
    return [subject for subject in subjects if (subject.op.name, subject.config.backend) == (op, backend)]


def pieces(
    subjects: Sequence[verification.Subject], tools: Sequence[str], names: Sequence[str], backends: Sequence[str]
) -> list[Piece]:
    """All pieces of the named tools, operations and backends, in the order in which they are begun."""
    found = []
    for tool in sorted(tools, key=TOOLS.index):
        for op, backend in sorted({(subject.op.name, subject.config.backend) for subject in subjects}):
            if (names and op not in names) or (backends and backend not in backends):
                continue
            shares = -(-len(all_cases(of(subjects, op, backend), tool)) // TOGETHER[tool])
            found += [Piece(tool, op, backend, share, shares) for share in range(shares)]
    return found


def cases_of(subject: verification.Subject, tool: str) -> Sequence[Case]:
    """All cases of a source, or the short ones where every access of a block is compared with all others."""
    op, spec, config = subject.op, subject.spec, subject.config
    if tool == "memcheck":
        return op.cases_for(spec, config)
    return list(dict.fromkeys(op.within_reach(spec, config, case) for case in op.cases(spec)))


def all_cases(subjects: Iterable[verification.Subject], tool: str) -> list[tuple[verification.Subject, Case]]:
    """The cases of all these sources; every so many-th is a share, so that the long ones of a source fall to several."""
    return [(subject, case) for subject in subjects for case in cases_of(subject, tool)]


def run_piece(piece: Piece, models: Sequence[str], gpu: Gpu) -> None:
    """The child's work: verify the cases of its share."""
    torch.zeros(1, device="cuda")  # makes the context, which a driver asked before it would report to be missing
    own = of(sources(models, gpu, [piece.op]), piece.op, piece.backend)
    found = all_cases(own, piece.tool)[piece.share :: piece.shares]
    for subject, together in itertools.groupby(found, key=operator.itemgetter(0)):
        op, spec, config = subject.op, subject.spec, subject.config
        sms = SMS.get(op.name) if config.backend == "cuda" and piece.tool != "memcheck" else None
        variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load()).within(sms or gpu.sms)
        for _, case in together:
            accuracy = verify(variant, case, "cuda")
            if not accuracy.passed:
                raise SystemExit(f"{op.name} {spec.id} {config} {case.id}: {accuracy.detail}")
    print(f"verified {len(found)} cases")


def kernels_of(piece: Piece, subjects: Sequence[verification.Subject], gpu: Gpu) -> set[str]:
    """The names, or parts of them, of the kernels that a piece launches."""
    return {name for built in builds_of(piece, subjects, gpu) for name in built.resources}


def builds_of(piece: Piece, subjects: Sequence[verification.Subject], gpu: Gpu) -> list[Built]:
    """What a piece may launch, from the cache."""
    mine = of(subjects, piece.op, piece.backend)
    return [build(render(subject.op, subject.spec, subject.config), gpu) for subject in mine]


def command_of(piece: Piece, kernels: Iterable[str], models: Sequence[str], option: str) -> list[str]:
    """The child under the tool."""
    chosen = [word for kernel in sorted(kernels) for word in (option, f"kns={kernel}")]
    named = [word for model in models for word in ("--preset", model)]
    child = [sys.executable, __file__, *named, "--piece", *map(str, vars(piece).values())]
    shown = ["--error-exitcode", "9", "--print-limit", "0", "--show-backtrace", "no"]
    return ["compute-sanitizer", "--tool", piece.tool, *shown, *chosen, *child]


def filter_option() -> str:
    """How this compute-sanitizer calls the choice of kernels by name."""
    known = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True).stdout
    return "--kernel-name" if "--kernel-name " in known else "--kernel-regex"


def check(piece: Piece, command: Sequence[str], seconds: float, out: Path, builds: Sequence[Built] = ()) -> Outcome:
    """Run a piece, which may launch what is in ``builds``; its report lies in ``out``."""
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    start, report = time.monotonic(), out / f"{piece.name}.txt"
    with report.open("w") as written:
        try:
            status = subprocess.run(command, stdout=written, stderr=written, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = None
    text = report.read_text(errors="replace")
    done = re.search(r"verified (\d+) cases", text)
    return Outcome(piece, _verdict(piece, status, text, builds), int(done[1]) if done else 0, time.monotonic() - start)


def _verdict(piece: Piece, status: int | None, text: str, builds: Sequence[Built]) -> str:
    if status is None:
        return "timeout"
    errors = sum(map(int, _SUMMARY.findall(text)))
    ordered = sum(in_order(piece, race, builds) for race in _RACE.findall(text)) if errors else 0
    if errors > ordered:
        return f"{errors - ordered} errors"
    if "verified" not in text or (status and not errors):
        return "failed"
    return f"clean but for {ordered} reports of what is in order" if ordered else "clean"


def in_order(piece: Piece, race: str, builds: Sequence[Built]) -> bool:
    """Whether a report is about lines between which the tool misses the order."""
    groups = ORDERED.get((piece.op, piece.backend), ())
    if piece.backend == "cuda":
        return source_lines.explained(race, groups, builds)
    lines = [line_of(file, int(line)) for file, line in _PLACE.findall(race)]
    return bool(lines) and any(all(any(part in line for part in group) for line in lines) for group in groups)


@functools.cache
def line_of(file: str, line: int) -> str:
    """A line of a rendered module, wherever in the build cache it lies."""
    found = next(paths.cache().glob(f"*/{file}"), None)
    return found.read_text().splitlines()[line - 1] if found else ""


def check_all(arguments: argparse.Namespace, gpu: Gpu) -> list[Outcome]:
    """Build everything, then check the pieces, several at once."""
    subjects = sources(arguments.preset or MODELS, gpu, arguments.op)
    chosen = pieces(subjects, arguments.tool or TOOLS, arguments.op, arguments.backend)
    kinds = {(piece.op, piece.backend) for piece in chosen}
    verification.build_ahead([subject for kind in kinds for subject in of(subjects, *kind)], gpu)
    option = filter_option()
    arguments.out.mkdir(parents=True, exist_ok=True)

    def one(piece: Piece) -> Outcome:
        command = command_of(piece, kernels_of(piece, subjects, gpu), arguments.preset or MODELS, option)
        outcome = check(piece, command, arguments.seconds, arguments.out, builds_of(piece, subjects, gpu))
        print(f"{piece.name}: {outcome.verdict}, {outcome.cases} cases, {outcome.seconds:.0f} s", flush=True)
        return outcome

    with ThreadPoolExecutor(arguments.jobs) as threads:
        return list(threads.map(one, chosen))


def show(outcomes: Sequence[Outcome]) -> None:
    """One line per operation and backend."""
    groups: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        cell = f"{outcome.piece.tool[:4]} {outcome.verdict} ({outcome.cases})"
        groups.setdefault((outcome.piece.op, outcome.piece.backend), []).append(cell)
    for (op, backend), cells in sorted(groups.items()):
        print(f"{op} {backend}: {', '.join(cells)}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="by default all three; each may be repeated")
    parser.add_argument("--op", action="append", default=[], choices=list(ops.all_ops()), help="by default all")
    parser.add_argument("--backend", action="append", default=[], help="by default all")
    parser.add_argument("--preset", action="append", default=[], help=f"by default {' and '.join(MODELS)}; may be repeated")
    parser.add_argument("--jobs", type=int, default=8, help="pieces at once, on one GPU")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a piece, at most")
    parser.add_argument("--out", type=Path, default=Path("sanitized"), help="folder of the reports")
    parser.add_argument("--list", action="store_true", help="only print the pieces")
    parser.add_argument("--piece", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    gpu = resolve("auto" if not arguments.list else "H100")
    if arguments.piece:
        tool, op, backend, share, shares = arguments.piece
        run_piece(Piece(tool, op, backend, int(share), int(shares)), arguments.preset or MODELS, gpu)
        return 0
    if arguments.list:
        own = sources(arguments.preset or MODELS, gpu, arguments.op)
        found = pieces(own, arguments.tool or TOOLS, arguments.op, arguments.backend)
        print("\n".join(piece.name for piece in found))
        return 0
    outcomes = check_all(arguments, gpu)
    show(outcomes)
    return 0 if all(outcome.verdict.startswith("clean") for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
