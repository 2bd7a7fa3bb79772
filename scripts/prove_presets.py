"""Prove the presets on a GPU: all that ``cli.py verify`` checks of each of them, what several share once, in processes at once.

    python scripts/prove_presets.py [--preset NAME ...] [--op NAME ...] [--own] [--after FILE] [--gpu NAME]
                                    [--repeats 2] [--workers 8] [--seconds 600] [--json FILE] [--page FILE]

Every operation, option and template of a preset runs its cases (fresh inputs, poisoned outputs, the plain PyTorch reference,
repeats bit for bit). A model's own specs come first, ``--own`` ends there; ``--after`` leaves out what an earlier run's file
shows as passed with the very text that is rendered today. With ``--gpu``, for a machine without one, they are compiled for it
and what is Triton's is interpreted, one after another. It prints a line for each preset, with ``--page`` also into that page's
table, and fails where something is wrong or was left for want of time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen import gpu as gpus  # noqa: E402
from dsa_codegen import ops  # noqa: E402
from dsa_codegen.cli.verify import OFFLINE  # noqa: E402
from dsa_codegen.command.verification import Subject, offline, run_cases, subjects_of  # noqa: E402
from dsa_codegen.kernels.render import render  # noqa: E402
from dsa_codegen.ops.needs import specs  # noqa: E402
from dsa_codegen.problem import presets  # noqa: E402
from dsa_codegen.problem.op import Op  # noqa: E402
from dsa_codegen.problem.values import Spec  # noqa: E402
from dsa_codegen.proof.crew import at_once  # noqa: E402
from dsa_codegen.worker import Worker  # noqa: E402

Row = dict[str, Any]
BY_NVCC = ("tilelang", "cuda")
_KEEP_EVERY = 10  # checks
_BEGIN, _END, _RULE = "<!-- presets -->", "<!-- /presets -->", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]*) \|", re.MULTILINE)


def key(op: Op, spec: Spec, backend: str, config: dict[str, Any], text: str) -> str:
    """What makes a check the same one in another preset, or in an earlier run: the spec, its text and how that is launched."""
    launch = {each.name: config.get(each.name) for each in op.parameters(backend) if each.launch_only}
    return json.dumps([op.name, spec.to_dict(), backend, launch, text], sort_keys=True)


def text_of(subject: Subject) -> str:
    """The hash of the subject's code (its first 16 digits), for the Triton that is installed."""
    return render(subject.op, subject.spec, subject.config).sha[:16]


def key_of(subject: Subject) -> str:
    config = subject.config
    return key(subject.op, subject.spec, config.backend, config.to_dict(), text_of(subject))


def wanted(names: list[str], gpu: gpus.Gpu, own: bool, only: Sequence[str] = ()) -> dict[str, dict[str, Subject]]:
    """By preset and key; with ``own`` the specs that the model itself calls, without their options."""
    known: dict[tuple[str, Spec], dict[str, Subject]] = {}  # presets share most of their specs
    found: dict[str, dict[str, Subject]] = {}
    for name in names:
        for op, spec in specs(presets.preset(name), (), gpu):
            if only and op.name not in only:
                continue
            if (op.name, spec) not in known:
                asked = (each for each in subjects_of(op, spec, gpu) if not own or each.spec == spec)
                known[op.name, spec] = {key_of(each): each for each in asked}
            found.setdefault(name, {}).update(known[op.name, spec])
    return found


def in_order(named: dict[str, dict[str, Subject]], gpu: gpus.Gpu) -> dict[str, Subject]:
    """Each check once: the models' own specs before options, of them what nvcc compiles first (it takes longest)."""
    own = {(op.name, spec) for name in named for op, spec in specs(presets.preset(name), (), gpu)}
    each = {check: subject for checks in named.values() for check, subject in checks.items()}

    def late(item: tuple[str, Subject]) -> tuple[bool, bool]:
        subject = item[1]
        return (subject.op.name, subject.spec) not in own, subject.config.backend not in BY_NVCC

    return dict(sorted(each.items(), key=late))


def row_of(subject: Subject, outcome: Any) -> Row:
    """A check's line of the file."""
    named = {"op": subject.op.name, "backend": subject.config.backend, "spec": subject.spec.to_dict()}
    row: Row = {**named, "config": subject.config.to_dict(), "text": text_of(subject), "cases": 0, "wrong": ""}
    if isinstance(outcome, list):
        wrong = [f"{verdict.check}: {verdict.detail}" for verdict in outcome if not verdict.passed]
        return {**row, "cases": len(outcome), "wrong": "; ".join(wrong)[:400]}
    return {**row, "wrong": f"{type(outcome).__name__}: {outcome}"[:400]}


def summary(named: dict[str, dict[str, Subject]], rows: dict[str, Row]) -> dict[str, dict[str, int]]:
    """By preset: checks, those that passed, failed and were left, and the cases that ran."""
    found = {}
    for name, checks in named.items():
        own = [rows[check] for check in checks if check in rows]
        wrong, cases = sum(bool(row["wrong"]) for row in own), sum(row["cases"] for row in own)
        counts = {"checks": len(checks), "passed": len(own) - wrong, "failed": wrong, "left": len(checks) - len(own)}
        found[name] = {**counts, "cases": cases}
    return found


def keep(file: Path | None, gpu: str, counts: dict[str, dict[str, int]], rows: dict[str, Row]) -> None:
    """Write the ``--json``, where one is wanted."""
    if file:
        file.write_text(json.dumps({"gpu": gpu, "presets": counts, "rows": list(rows.values())}, indent=1))


def paged(page: str, own: dict[str, dict[str, int]], every: dict[str, dict[str, int]]) -> str:
    """The page with today's counts in its table; what a preset brings stays as the page says it."""
    head, begin, rest = page.partition(_BEGIN)
    table, end, tail = rest.partition(_END)
    brings = dict(_ROW.findall(table))
    lines = ["", "| preset | what it brings | own checks | passed | with options | passed | cases |", _RULE]
    for name, each in every.items():
        counts = (own[name]["checks"], own[name]["passed"], each["checks"], each["passed"], each["cases"])
        lines.append(f"| `{name}` | {brings.get(name, '')} | " + " | ".join(map(str, counts)) + " |")
    return head + begin + "\n".join(lines) + "\n" + end + tail


def earlier(file: Path | None) -> dict[str, Row]:
    """What passed in an earlier run, by key: a row counts where its text is still rendered, whatever else has changed since.

    Fields that specs have grown are at their defaults.
    """
    found = {}
    for row in json.loads(file.read_text())["rows"] if file else []:
        op = ops.get(row["op"])
        if not row["wrong"]:
            found[key(op, op.spec_type.from_dict(row["spec"]), row["backend"], row["config"], row["text"])] = row
    return found


def without_gpu(subjects: Sequence[Subject], gpu: gpus.Gpu, seconds: float, told: Callable[[int, Any], None]) -> None:
    """Compile and interpret until time is up."""
    end = time.monotonic() + seconds
    with Worker(OFFLINE) as interpreter:
        for number, subject in enumerate(subjects):
            if time.monotonic() < end:
                told(number, list(offline(subject, gpu, interpreter)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="all, where none is named")
    parser.add_argument("--op", action="append", default=[], help="all, where none is named")
    parser.add_argument("--own", action="store_true", help="the specs that the models call, without their options")
    parser.add_argument("--after", type=Path, metavar="FILE", help="the --json of an earlier run")
    parser.add_argument("--gpu", help="compile for this one, and interpret: nothing runs on a GPU")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8, help="processes that build and run at once")
    parser.add_argument("--seconds", type=float, default=600.0, help="for it all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="write the counts into the table between its marks, docs/shapes.md's say")
    return parser.parse_args()


def main() -> int:
    asked, start = arguments(), time.monotonic()
    gpu = gpus.resolve(asked.gpu) if asked.gpu else gpus.detect()
    if gpu is None:
        print("no GPU here: --gpu H100 interprets and compiles")
        return 2
    names = asked.preset or presets.names()
    named, rows = wanted(names, gpu, asked.own, asked.op), earlier(asked.after)
    todo = {check: subject for check, subject in in_order(named, gpu).items() if check not in rows}
    checks, calls = list(todo), [(subject, gpu, asked.repeats) for subject in todo.values()]

    def told(number: int, outcome: Any) -> None:
        row = rows[checks[number]] = row_of(todo[checks[number]], outcome)
        if row["wrong"]:
            print(f"WRONG {row}", flush=True)
        if len(rows) % _KEEP_EVERY == 0:  # whoever ends this run early has what it found
            keep(asked.json, gpu.id, summary(named, rows), rows)

    rest = asked.seconds - (time.monotonic() - start)
    if asked.gpu:
        without_gpu(list(todo.values()), gpu, rest, told)
    else:
        at_once(run_cases, calls, asked.workers, seconds=rest, told=told)
    counts = summary(named, rows)
    keep(asked.json, gpu.id, counts, rows)
    if asked.page:
        own = summary(wanted(names, gpu, True, asked.op), rows)
        asked.page.write_text(paged(asked.page.read_text(), own, counts))
    for name, each in counts.items():
        print(f"{name:24} " + " ".join(f"{what} {number:5}" for what, number in each.items()))
    seconds, left = time.monotonic() - start, len(todo) - sum(check in rows for check in checks)
    print(f"{len(todo)} checks of {len(names)} presets {'for' if asked.gpu else 'on'} {gpu.id} in {seconds:.0f} s, {left} left")
    return int(any(each["failed"] or each["left"] for each in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
