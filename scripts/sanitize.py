"""Run every operation and backend of small models under compute-sanitizer, in short pieces, several at once.

    python scripts/sanitize.py [--tool memcheck] [--op select] [--backend cuda] [--jobs 12] [--within 300] [--resume LEDGER]

A piece is about ten cases of one operation and backend in a process of its own, verified as ``cli.py verify`` does. It stops by
itself when its seconds are up. Texts are compiled meanwhile, and a piece begins when its own are there. Only this project's
kernels are looked at, torch's are not. synccheck and racecheck look at barriers and shared memory, memcheck at every address,
every tensor in an allocation of its own, long cases among them.

What is run (``scripts/sanitizing/sources.py``): every text of `tiny` and, for grouped queries, `tiny-gqa`, of training too; in
CUDA C++ those of 128 heads besides, prefill attention's of 64 and a longer k; and designs that only other shapes bring. What is
thinned: a text runs with four of its cases (every sequence of kernels that it launches among them; one text's cases begin where
the text before it did not), ``--thorough`` runs all. A case that launches nothing is none.

``--out`` holds a report of each piece and ``ended.jsonl``, to which each piece adds its line as it ends; ``--resume`` skips
what has ended clean there, or in another ledger, for the same text. ``--judge`` looks at the reports of a run that could not.

Exit status: 0 where every case that was wanted is clean, 1 where one is not, or was not reached.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import ops  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from dsa_codegen.kernels.build import Built, build, build_all, find  # noqa: E402
from dsa_codegen.kernels.render import Rendered  # noqa: E402
from scripts.sanitizing import cases, ledger, pieces, reports, sources  # noqa: E402
from scripts.sanitizing.pieces import Piece  # noqa: E402

LEDGER = "ended.jsonl"
_LEAST = 15.0  # seconds that a piece must be given to be worth its start
_GRACE = 8.0  # seconds behind its own end that a process is given to finish a case and its report
_LAST = 3.0  # seconds of the whole run that are kept for the summary
_POLL = 0.25
_TOGETHER = 2  # texts of a compiler that are compiled before the next ones


@dataclass
class Run:
    """One run of the script: on which GPU, where to, and until when."""

    gpu: Gpu
    out: Path
    jobs: int
    seconds: float
    until: float
    built: dict[str, Built] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the end of the run."""
        return self.until - time.time()

    def is_ready(self, piece: Piece) -> bool:
        """Whether all texts of a piece are compiled."""
        return len(self.builds(piece)) == len(piece.subjects)

    def builds(self, piece: Piece) -> list[Built]:
        """Those of a piece's texts that are there."""
        return [built for built in map(self._find, map(sources.run_in_place, piece.subjects)) if built]

    def _find(self, text: Rendered) -> Built | None:
        if text.sha not in self.built and (found := find(text, self.gpu)):
            self.built[text.sha] = found
        return self.built.get(text.sha)


def command_of(piece: Piece, file: Path, until: float, kernels: Iterable[str]) -> list[str]:
    """The child under the tool."""
    chosen = [word for kernel in sorted(kernels) for word in (filter_option(), f"kns={kernel}")]
    child = [sys.executable, "-W", "ignore", __file__, "--piece", str(file), str(until)]
    shown = ["--error-exitcode", "9", "--print-limit", "0", "--show-backtrace", "no"]
    return ["compute-sanitizer", "--tool", piece.tool, *shown, *chosen, *child]


@functools.cache
def filter_option() -> str:
    """How this compute-sanitizer calls the choice of kernels by name."""
    known = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True).stdout
    return "--kernel-name" if "--kernel-name " in known else "--kernel-regex"


def check(piece: Piece, run: Run) -> None:
    """Run a piece; its report lies in the folder, its line in the ledger."""
    seconds = min(run.seconds, run.left() - _LAST)
    file, report = (run.out / f"{piece.name}{ending}" for ending in (".piece", ".txt"))
    file.write_bytes(pickle.dumps((run.gpu, piece)))
    kernels = {name for built in run.builds(piece) for name in built.resources}
    start = time.time()
    command = command_of(piece, file, start + max(seconds - _GRACE, seconds / 2), kernels)
    status = supervised(command, report, piece.tool, seconds)
    text = report.read_text(errors="replace")
    entry = ledger.line(piece, reports.first_look(status, text), reports.ended(text), time.time() - start)
    ledger.append(run.out / LEDGER, entry)
    print(
        f"{piece.name}: {entry['verdict']}, {reports.ended(text)} of {len(piece.checks)} cases, {entry['seconds']} s",
        flush=True,
    )


def supervised(command: Sequence[str], report: Path, tool: str, seconds: float) -> int | None:
    """The status that a command ends with, None where it was stopped; what it says goes into ``report``."""
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    with report.open("w") as written:
        started = subprocess.Popen(command, stdout=written, stderr=written, env={**os.environ, **own}, start_new_session=True)
        try:
            return started.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the tool's child, too
            started.wait()
            return None


def compile_ahead(wanted: Sequence[Piece], run: Run) -> subprocess.Popen[bytes]:
    """A process that compiles the pieces' texts, the first ones first."""
    file = run.out / "texts.pickle"
    texts = {sources.rendered(subject).sha: subject for piece in wanted for subject in piece.subjects}
    file.write_bytes(pickle.dumps((run.gpu, list(texts.values()))))
    command = [sys.executable, "-W", "ignore", __file__, "--compile", str(file), "--jobs", str(run.jobs)]
    with (run.out / "compiled.txt").open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def check_all(wanted: Sequence[Piece], run: Run) -> None:
    """Check the pieces whose texts are there, as many at once as the run says, until its time is up."""
    compiling, waiting, begun = compile_ahead(wanted, run), list(wanted), set[Future[None]]()
    with ThreadPoolExecutor(run.jobs) as threads:
        while (waiting and run.left() > _LEAST + _LAST) or begun:
            compiled = compiling.poll() is not None
            free = run.jobs - len(begun) if run.left() > _LEAST + _LAST else 0
            ready = list(itertools.islice(filter(run.is_ready, waiting), free))
            if compiled and not ready and not begun:
                break  # what is left cannot be compiled
            begun |= {threads.submit(check, piece, run) for piece in ready}
            waiting = [piece for piece in waiting if piece not in ready]
            done, begun = wait(begun, timeout=_POLL, return_when=FIRST_COMPLETED)
            for each in done:
                each.result()
            if not begun:
                time.sleep(_POLL)
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.killpg(compiling.pid, signal.SIGKILL)
    compiling.wait()
    for piece in waiting:
        print(f"{piece.name}: not begun, {'' if run.is_ready(piece) else 'not compiled, '}{len(piece.checks)} cases")


def judge(run: Run) -> None:
    """Look at the reports of pieces that ended with some, while time is left; the judgement stands behind their lines."""
    for entry in ledger.latest(ledger.read([run.out / LEDGER])):
        if not entry["verdict"].endswith("reports") or run.left() < _LAST:
            continue
        _, piece = pickle.loads((run.out / f"{entry['piece']}.piece").read_bytes())
        text = (run.out / f"{piece.name}.txt").read_text(errors="replace")
        builds = [build(sources.run_in_place(subject), run.gpu) for subject in piece.subjects]
        entry["verdict"] = reports.judged(piece, entry["verdict"], text, builds)
        ledger.append(run.out / LEDGER, entry)
        print(f"{piece.name}: {entry['verdict']}", flush=True)


def compile_all(file: Path, processes: int) -> int:
    """The compiling child's work; the first text in the file is compiled first."""
    gpu, subjects = pickle.loads(file.read_bytes())
    waiting, failed = list(map(sources.run_in_place, subjects)), {}
    while waiting:  # so few at a time as keep the order: all that is there would be compiled one language after the other
        failed |= build_all(waiting[: _TOGETHER * processes], gpu, processes)
        waiting = waiting[_TOGETHER * processes :]
    print("\n".join(failed.values()))
    return 1 if failed else 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=cases.TOOLS, help="by default all three; each may be repeated")
    parser.add_argument("--op", action="append", default=[], choices=list(ops.all_ops()), help="by default all")
    parser.add_argument("--backend", action="append", default=[], help="by default all")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="only texts whose spec and config show this regular expression"
    )
    parser.add_argument("--without", default="", metavar="WORDS", help="no texts that show this one: sharers=16")
    parser.add_argument("--preset", action="append", default=[], help=f"by default {' and '.join(sources.MODELS)}")
    parser.add_argument("--thorough", action="store_true", help="all cases of a text, not the few that stand for them")
    parser.add_argument("--jobs", type=int, default=8, help="pieces at once, on one GPU; compilers beside them are as many")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a piece, at most")
    parser.add_argument("--within", type=float, default=24 * 3600.0, help="seconds of the whole run, at most")
    parser.add_argument("--resume", type=Path, action="append", default=[], help="ledgers whose clean cases are not run again")
    parser.add_argument("--out", type=Path, default=Path("sanitized"), help="folder of the reports and of the ledger")
    parser.add_argument("--record", type=Path, help="write what is clean of today's texts, here and in --resume")
    parser.add_argument("--list", action="store_true", help="only print the pieces, and what is left of each operation")
    parser.add_argument("--judge", action="store_true", help="only look at the reports that lie in the folder")
    parser.add_argument("--unjudged", action="store_true", help="leave reports to a later --judge")
    parser.add_argument("--gpu", default="", help="without one at hand, for --list and --judge: H200, say")
    parser.add_argument("--piece", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def wanted_of(arguments: argparse.Namespace, gpu: Gpu) -> list[cases.Check]:
    """The checks that the command line asks for, whether they have ended or not."""
    found = sources.sources(arguments.preset or sources.MODELS, gpu, arguments.op)
    chosen = [each for each in found if not arguments.backend or each.config.backend in arguments.backend]
    wanted = cases.checks(chosen, arguments.tool or cases.TOOLS, gpu, arguments.thorough)
    return [check for check in wanted if shown(check.subject, arguments)]


def shown(subject: sources.Subject, arguments: argparse.Namespace) -> bool:
    """Whether a text is among those that ``--only`` and ``--without`` leave."""
    name = f"{subject.spec.id} {subject.config}"
    return bool(re.search(arguments.only, name)) and not (arguments.without and re.search(arguments.without, name))


def child(arguments: argparse.Namespace) -> int:
    """The work of a process that this script starts."""
    if arguments.compile:
        return compile_all(arguments.compile, arguments.jobs)
    from scripts.sanitizing.child import run

    file, until = arguments.piece
    run(Path(file), float(until))
    return 0


def work(arguments: argparse.Namespace, todo: Sequence[Piece], gpu: Gpu) -> None:
    """Check the pieces, and look at their reports."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(gpu, arguments.out, arguments.jobs, arguments.seconds, time.time() + arguments.within)
    if not arguments.judge:
        check_all(todo, run)
    if not arguments.unjudged:
        judge(run)


def main() -> int:
    arguments = parsed()
    if arguments.piece or arguments.compile:
        return child(arguments)
    gpu = resolve(arguments.gpu or "auto")
    wanted = wanted_of(arguments, gpu)
    todo = pieces.pieces(wanted, ledger.ended_clean(ledger.latest(ledger.read(arguments.resume))))
    if arguments.list:
        print("\n".join(f"{piece.name}: {len(piece.checks)} cases" for piece in todo))
    else:
        work(arguments, todo, gpu)
    entries = ledger.latest(ledger.read(dict.fromkeys([*arguments.resume, arguments.out / LEDGER])))
    print("\n".join(ledger.summary(wanted, entries)))
    if arguments.record:
        arguments.record.write_text("".join(map(ledger.as_line, ledger.merged(entries, wanted, gpu.id))))
    return 0 if {check.key for check in wanted} <= ledger.ended_clean(entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())
