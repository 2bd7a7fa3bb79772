"""Runs pieces: texts are compiled, a piece begins when its own are there, and is written down when it ends."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from dsa_codegen.errors import ToolMissing
from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels import backends
from dsa_codegen.kernels.build import Built, build, build_all, find
from dsa_codegen.kernels.render import Rendered

from . import ledger, reports, sources
from .pieces import Piece

SCRIPT = Path(__file__).resolve().parents[1] / "sanitize.py"
"""What a process of its own runs."""
LEDGER = "ended.jsonl"
_LEAST = 15.0  # seconds that a piece must be given to be worth its start
_GRACE = 8.0  # seconds behind its own end that a process is given to finish a case and its report
_LAST = 3.0  # seconds of the whole run that are kept for the summary
_POLL = 0.25
_BARRIERS = 256
"""Barriers of a block that synccheck is told to follow where threads make them abreast. By itself it takes number and place
from the compiler, which counts these as one (``EIATTR_NUM_MBARRIERS``); it ends warps that wait for a barrier beyond that, and
rows stay unwritten that are right without the tool. A kernel of a few lines whose 32 threads make a barrier each fails so, when
told 32, too, and passes when told 64 or 1024."""
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

    @property
    def threads(self) -> int:
        """Of a piece's process: references are computed on the CPU, and every process would take all cores for its own."""
        return max(1, (os.cpu_count() or 1) // self.jobs)

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
    child = [sys.executable, "-W", "ignore", str(SCRIPT), "--piece", str(file), str(until)]
    shown = ["--error-exitcode", "9", "--print-limit", "0", "--show-backtrace", "no"]
    return ["compute-sanitizer", "--tool", piece.tool, *barriers_of(piece), *shown, *chosen, *child]


def barriers_of(piece: Piece) -> list[str]:
    """How many barriers synccheck is told of, where it would count too few."""
    abreast = piece.tool == "synccheck" and any(map(sources.makes_barriers_abreast, piece.subjects))
    return ["--num-cuda-barriers", str(_BARRIERS)] if abreast else []


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
    status = supervised(command, report, piece.tool, seconds, run.threads)
    text = report.read_text(errors="replace")
    entry = ledger.line(piece, reports.first_look(status, text), reports.ended(text), time.time() - start)
    ledger.append(run.out / LEDGER, entry)
    print(
        f"{piece.name}: {entry['verdict']}, {reports.ended(text)} of {len(piece.checks)} cases, {entry['seconds']} s",
        flush=True,
    )


def supervised(command: Sequence[str], report: Path, tool: str, seconds: float, threads: int) -> int | None:
    """The status that a command ends with, None where it was stopped; what it says goes into ``report``."""
    own = {"OMP_NUM_THREADS": str(threads)} | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
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
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--compile", str(file), "--jobs", str(run.jobs)]
    with (run.out / "compiled.txt").open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def with_compilers(wanted: Sequence[Piece]) -> list[Piece]:
    """Those whose backend can compile here; of the others the reason is told, and the run goes on without them."""
    lacking: dict[str, str] = {}
    for backend in sorted({piece.backend for piece in wanted}):
        try:
            backends.get(backend).toolchain()
        except ToolMissing as error:  # a library of its own may lack, too
            lacking[backend] = str(error)
            count = sum(len(piece.checks) for piece in wanted if piece.backend == backend)
            print(f"{backend}: not begun, {count} cases: {error}")
    return [piece for piece in wanted if piece.backend not in lacking]


def check_all(wanted: Sequence[Piece], run: Run) -> None:
    """Check the pieces whose texts are there, as many at once as the run says, until its time is up."""
    wanted = with_compilers(wanted)
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
