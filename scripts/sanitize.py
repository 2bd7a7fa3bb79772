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
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import ops  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from scripts.sanitizing import cases, ledger, pieces, runner, sources  # noqa: E402


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
    parser.add_argument("--record", type=Path, help="write what is clean of today's texts: here, there, in --resume")
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


def of_today(wanted: Sequence[cases.Check], gpu: Gpu) -> list[cases.Check]:
    """What a record may hold: a run of one operation takes nothing from the others."""
    every = cases.checks(sources.sources(sources.MODELS, gpu), cases.TOOLS, gpu, thorough=True)
    return list({check.key: check for check in [*every, *wanted]}.values())


def shown(subject: sources.Subject, arguments: argparse.Namespace) -> bool:
    """Whether a text is among those that ``--only`` and ``--without`` leave."""
    name = f"{subject.spec.id} {subject.config}"
    return bool(re.search(arguments.only, name)) and not (arguments.without and re.search(arguments.without, name))


def child(arguments: argparse.Namespace) -> int:
    """The work of a process that this script starts."""
    if arguments.compile:
        return runner.compile_all(arguments.compile, arguments.jobs)
    from scripts.sanitizing.child import run

    file, until = arguments.piece
    run(Path(file), float(until))
    return 0


def work(arguments: argparse.Namespace, todo: Sequence[pieces.Piece], gpu: Gpu, until: float) -> None:
    """Check the pieces, and look at their reports, until then (seconds of the clock)."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = runner.Run(gpu, arguments.out, arguments.jobs, arguments.seconds, until)
    if not arguments.judge:
        runner.check_all(todo, run)
    if not arguments.unjudged:
        runner.judge(run)


def main() -> int:
    arguments = parsed()
    if arguments.piece or arguments.compile:
        return child(arguments)
    until = time.time() + arguments.within  # rendering what is wanted takes some of it
    gpu = resolve(arguments.gpu or "auto")
    wanted = wanted_of(arguments, gpu)
    todo = pieces.pieces(wanted, ledger.ended_clean(ledger.read(arguments.resume)))
    if arguments.list:
        print("\n".join(f"{piece.name}: {len(piece.checks)} cases" for piece in todo))
    else:
        work(arguments, todo, gpu, until)
    entries = ledger.read(dict.fromkeys([*arguments.resume, arguments.out / runner.LEDGER]))
    print("\n".join(ledger.summary(wanted, entries)))
    if arguments.record:
        entries += ledger.read([arguments.record])
        arguments.record.write_text("".join(map(ledger.as_line, ledger.merged(entries, of_today(wanted, gpu), gpu.id))))
    return 0 if {check.key for check in wanted} <= ledger.ended_clean(entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())
