"""Compile what the table of docs/matrix.md does not hold yet: Tritons, templates and GPUs, and one of each template per Python.

    python scripts/matrix                                   # all; makes environments of 3 GB under .matrix/
    python scripts/matrix --triton 3.8 --triton nvcc        # these compilers alone
    python scripts/matrix --python 3.14                     # this Python alone
    python scripts/matrix --first                           # of models only deepseek-v3.2 and tiny, and the records
    python scripts/matrix --environment 3.8=.venv/bin/python    # an environment that is there

The table is written after every result: an interrupted run goes on where it was. Exit code 1 where something is refused.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsa_codegen.command.waiting import progress

import environments
import table as tables
from subjects import COMPILERS, FIRST, NVCC, ROOT, Key, digest, subjects

console = Console(stderr=True)


def main() -> int:
    """See the module's first lines."""
    options = _options()
    own = dict(each.split("=", 1) for each in options.environment)
    everything = not (options.triton or options.python)
    table = tables.load()
    table.prune()
    tables.save(table)
    for compiler in options.triton or (COMPILERS if everything else ()):
        _compile(table, compiler, own, options)
    for python in options.python or (environments.PYTHONS if everything else ()):
        _try_python(table, python, own, options.jobs)
    refused = [(compiler, name) for compiler, lines in table.lines.items() for name, line in lines.items() if line.refused]
    for compiler, template in refused:
        console.print(f"{template} with {compiler}: {table.lines[compiler][template].refused}", style="red", markup=False)
    return bool(refused)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="append", choices=COMPILERS, help="only this compiler; may be repeated")
    parser.add_argument("--python", action="append", choices=environments.PYTHONS, help="only this Python; may be repeated")
    parser.add_argument("--environment", action="append", default=[], metavar="3.8=PYTHON", help="an interpreter for it")
    parser.add_argument("--first", action="store_true", help=f"of models only {', '.join(FIRST)}, and the records")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at once")
    return parser.parse_args()


def _compile(table: tables.Table, compiler: str, own: dict[str, str], options: argparse.Namespace) -> None:
    known = subjects(compiler)
    keys = [key for key in table.missing(compiler) if known[key].first or not options.first]
    if not keys:
        console.print(f"{compiler}: all in the table")
        return
    answers = _asked(own.get(compiler) or environments.made(environments.USUAL, compiler), compiler, keys, options.jobs)
    table.versions[compiler] = _told(next(answers)["versions"], compiler)
    commit, date = _commit(), datetime.date.today().isoformat()

    def take(_: Key) -> None:
        answer = next(answers)
        table.add(compiler, tuple(answer["key"]), answer["reason"], commit, date)
        tables.save(table)

    progress(console, f"{compiler}: {len(keys)} of {len(known)} texts", keys, take)


def _told(versions: dict[str, str], compiler: str) -> dict[str, str]:
    """Of the versions in an environment those that this compiler's builds depend on."""
    names = ("tilelang", "nvidia-cuda-nvcc") if compiler == NVCC else ("triton", "torch", "python")
    return {name: versions[name] for name in names}


def _try_python(table: tables.Table, python: str, own: dict[str, str], jobs: int) -> None:
    """Every text is rendered there as here, and one of each template is compiled for Hopper."""
    there = own.get(python) or environments.made(python, environments.NEWEST)
    wanted, first = {}, {}
    for compiler in (environments.NEWEST, NVCC):
        for key in subjects(compiler):
            if key[2] == "sm_90a":
                first.setdefault(key[0], (compiler, key))
    for compiler, key in first.values():
        wanted.setdefault(compiler, []).append(key)
    done, same, versions = [], True, {}
    for compiler, keys in wanted.items():
        answers = _asked(there, compiler, keys, jobs)
        head = next(answers)
        versions, same = head["versions"], same and head["digest"] == digest(compiler)
        done += progress(console, f"Python {python}, {compiler}", keys, lambda _, answers=answers: next(answers)["reason"])
    table.pythons[python] = {
        "versions": versions,
        "rendered": "the same" if same else "others",
        "templates": len(done),
        "compiled": done.count(""),
        "commit": _commit(),
    }
    tables.save(table)


def _asked(python: str, compiler: str, keys: Sequence[Key], jobs: int) -> Iterator[dict[str, Any]]:
    """What the environment answers, line by line."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(here))), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-c", "from compiling import main; main()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None and process.stdout is not None
    json.dump({"compiler": compiler, "keys": keys, "processes": min(jobs, len(keys))}, process.stdin)
    process.stdin.close()
    with process:
        for line in process.stdout:
            if line.startswith('{"'):  # compilers print what they like
                yield json.loads(line)
    if process.returncode:
        sys.exit(f"{python} ended with {process.returncode}")


def _commit() -> str:
    """HEAD, and a plus where files that decide what is compiled differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "templates", "dsa_codegen"], capture_output=True, text=True).stdout
    return head + ("+" if changed.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
