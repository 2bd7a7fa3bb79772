"""The command line end to end, without a GPU: every command is shown in the documents, and what is shown runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from dsa_codegen import gpu as gpus
from dsa_codegen import ops
from dsa_codegen.cli import app, given
from dsa_codegen.errors import NoGpu, SpecError

from command_line import cli
from support import UNMEASURED_H100

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = set(ops.all_ops()) - UNMEASURED_H100  # operations that have records of the GPU that is asked for
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def shown() -> list[str]:
    """The commands of the documents' shell examples, those of the installation aside."""
    pages = ((ROOT / page).read_text() for page in ("README.md", "docs/usage.md"))
    lines = [line for page in pages for block in SHELL.findall(page) for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("python cli.py ")))


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run an example as it is shown, in ``folder``, where its files and records go."""
    return cli(*shlex.split(command)[2:], cwd=folder, **{"DSA_TUNED_DIR": str(folder / "records"), **environment})


def test_every_command_is_shown():
    """Also that a process of its own starts, which the other tests save."""
    environment = {**os.environ, "COLUMNS": "200"}
    listed = subprocess.run([sys.executable, ROOT / "cli.py", "--help"], capture_output=True, text=True, env=environment).stdout
    commands = set(re.findall(r"^\W+([a-z]+) {2,}[A-Z]", listed, re.MULTILINE))
    assert {"generate", "verify", "tune", "bench", "list", "explain", "doctor"} <= commands
    assert {command.split()[2] for command in shown()} == commands


def test_no_option_is_named_after_its_metavar():
    """typer 0.27.0 calls an option --FOLDER whose name is left to it and whose metavar is that name in capitals."""
    named = []
    for command in app.registered_commands:
        for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
            for option in getattr(hint, "__metadata__", ()):  # "default" is the first name here, if one is stated
                named.append(f"{command.name} --{name}")
                assert isinstance(option.default, str) or (option.metavar or "").lower() != name, named[-1]
    assert "tune --folder" in named


def test_what_tune_finds_is_listed_and_serves(tmp_path):
    """A new user's way for a GPU that is not here."""
    done = run("python cli.py tune --gpu H100 --preset tiny --op quantize --trials 1", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(run("python cli.py list --gpu h100 --json", tmp_path).stdout)
    shipped = {(name, "measured") for name in SHIPPED}
    assert {(row["op"], row["evidence"]) for row in rows} == {("quantize", "modelled"), *shipped}
    call = "python cli.py explain --op quantize --preset tiny --gpu h100 --json tokens=64"
    answers = json.loads(run(call, tmp_path).stdout)
    assert {answer["origin"] for answer in answers} == {"modelled"}
    assert all(answer["sizes"] == {"tokens": 64} for answer in answers)


def test_explain_goes_through_what_people_serve(tmp_path):
    done = run("python cli.py explain --op attention --preset glm-5 --gpu rtx5090 --json", tmp_path)
    sizes = [answer["sizes"] for answer in json.loads(done.stdout)]
    assert len(sizes) == 4
    assert {"queries": 4096, "tokens": 32768} in sizes
    plain = run("python cli.py explain --op attention --preset glm-5 --gpu rtx5090", tmp_path)
    assert "python cli.py tune --gpu rtx5090 --op attention --preset glm-5" in plain.stdout


def test_help_names_every_operation_and_its_sizes(tmp_path):
    text = " ".join(run("python cli.py explain --help", tmp_path, COLUMNS="1000").stdout.split())
    assert "select: rows=… columns=…" in text
    assert "attention_paged: batch=… next_n=… tokens=…" in text


@pytest.mark.parametrize("command", ["explain", "verify", "tune", "build --out builds", "generate --out generated"])
def test_an_operation_that_the_model_does_not_call_is_said(command, tmp_path):
    """Nothing was checked, tuned or built: that is no success."""
    done = run(f"python cli.py {command} --op attention_paged --preset glm-5.3-flash --gpu h200", tmp_path, COLUMNS="1000")
    assert done.returncode == 2
    assert "'attention_paged' is not possible; allowed: what glm-5.3-flash calls: adapt, attention, " in done.stderr


@pytest.mark.parametrize("sizes", ["queries=²", "queries=1 context"])
def test_sizes_that_are_no_numbers(sizes, tmp_path):
    done = run(f"python cli.py explain --op indexer --gpu h200 {sizes}", tmp_path)
    assert done.returncode == 2
    assert "whole number" in done.stderr


def test_bench_refuses_another_gpu_than_the_one_that_is_meant(monkeypatch):
    monkeypatch.setattr(gpus, "detect", lambda: gpus.resolve("h100"))
    with pytest.raises(SpecError, match="h100, which is here"):
        given.visible("H200")


@pytest.mark.parametrize("named", ["auto", "h200"])
def test_bench_needs_a_gpu(named, monkeypatch):
    monkeypatch.setattr(gpus, "detect", lambda: None)
    with pytest.raises(NoGpu):
        given.visible(named)


@pytest.mark.parametrize("named", ["auto", "h200", "H200"])
def test_bench_measures_on_the_gpu_that_is_meant(named, monkeypatch):
    monkeypatch.setattr(gpus, "detect", lambda: gpus.resolve("h200"))
    assert given.visible(named).id == "h200"


def test_the_list_fits_a_narrow_terminal(tmp_path):
    """In 80 columns no word is broken, no line goes over, and every record is grouped by its operation."""
    shown = run("python cli.py list --gpu h100", tmp_path, COLUMNS="80").stdout.splitlines()
    assert max(map(len, shown)) <= 80
    words = {word.strip(",;") for line in shown for word in line.split()}
    rows = json.loads(run("python cli.py list --gpu h100 --json", tmp_path).stdout)
    assert {row["backend"] for row in rows} <= words
    assert {f"{name}={value}" for row in rows for name, value in row["config"].items()} <= words
    assert [line.strip() for line in shown if line.startswith("  ") and line[2] != " "] == sorted(SHIPPED)
    assert len(shown) < 4 * len(rows) + 20  # a line or two a record, and the groups' heads


def test_the_list_says_which_record_serves(tmp_path):
    rows = json.loads(run("python cli.py list --gpu h100 --json", tmp_path).stdout)
    calls = {}
    for row in rows:
        calls.setdefault((row["op"], str(row["spec"]), row["bucket"]), []).append(row)
    for found in calls.values():
        # Records of tighter buckets may serve all that a wide one holds.
        assert sum(row["status"] == "serves" for row in found) <= 1
        assert all(row["why"].startswith("by ") for row in found if row["status"] == "shadowed")
    shutil.copytree(ROOT / "tuned" / "h100", tmp_path / "records" / "h100")
    again = json.loads(run("python cli.py list --gpu h100 --json", tmp_path).stdout)
    assert len(again) == 2 * len(rows)
    serving = sum(row["status"] == "serves" for row in rows)
    assert {row["op"] for row in rows if row["status"] == "serves"} == SHIPPED
    assert sum(row["status"] == "serves" for row in again) == serving, "own records go before the shipped ones"
    assert any("of DSA_TUNED_DIR" in row["why"] for row in again)


def test_a_damaged_file_is_told_once(tmp_path):
    path = tmp_path / "records" / "h200" / "select.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    done = run("python cli.py explain --op select --gpu h200", tmp_path, COLUMNS="1000")
    assert done.returncode == 0
    assert done.stderr.count("is not a file of records") == 1, done.stderr
    assert "RecordWarning" not in done.stderr and "stacklevel" not in done.stderr
