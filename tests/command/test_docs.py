"""The documents' examples run, and the command line does what the documents say."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/usage.md", "docs/engines.md"]
COMMAND_PAGES = [*PAGES, "docs/benchmark.md", "docs/performance.md"]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_run(page, capsys):
    namespace: dict = {}
    examples = PYTHON.findall((ROOT / page).read_text())
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), namespace)


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line as a user would, without a GPU."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, ROOT / "cli.py", *arguments], capture_output=True, text=True, env=variables)


@functools.cache
def help_of(command: str) -> str:
    """What ``--help`` prints."""
    shown = cli(command, "--help")
    assert shown.returncode == 0, command
    return shown.stdout


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_commands_and_options_exist(page):
    commands = re.findall(r"python cli\.py ([a-z]+)([^`#\n]*)", (ROOT / page).read_text())
    assert commands
    for command, rest in commands:
        text = help_of(command)
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in text, f"{command} {option}"


def test_doctor_says_what_is_missing():
    shown = cli("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(shown.stdout)}
    assert shown.returncode == 0
    assert not findings["GPU"]["ok"]
    assert "--gpu H100" in findings["GPU"]["remedy"]
    assert findings["triton"]["ok"]


def test_generate_writes_modules_that_import(tmp_path):
    shown = cli("generate", "--preset", "tiny", "--op", "indexer", "--gpu", "h200", "--out", str(tmp_path), "--json")
    assert shown.returncode == 0, shown.stderr
    for row in json.loads(shown.stdout):
        subprocess.run([sys.executable, row["file"]], check=True)


def test_explain_names_the_origin():
    shown = cli("explain", "--op", "indexer", "--preset", "tiny", "--gpu", "a100", "queries=1", "context=9", "--json")
    assert shown.returncode == 2  # FP8 needs sm_89
    shown = cli("explain", "--op", "indexer", "--preset", "tiny", "--gpu", "l40s", "queries=1", "context=9", "--json")
    assert json.loads(shown.stdout)[0]["origin"] == "default"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tune", "--gpu", "H1000x"], 2, "unknown GPU"),
        (["verify", "--preset", "gpt"], 2, "unknown preset"),
        (["verify", "--op", "softmax"], 2, "unknown operation"),
        (["verify", "--spec", "/nowhere.yaml"], 2, "spec file"),
        (["tune", "--budget", "soon"], 2, "10m"),
        (["explain", "--op", "indexer", "queries=many"], 2, "whole number"),
        (["explain", "--op", "indexer", "rows=1"], 2, "queries, context"),
        (["bench"], 3, "--gpu H100"),
        (["verify", "--gpu", "a100", "--op", "indexer"], 2, "sm_89"),
        (["generate", "--backend", "cuda"], 2, "triton, gluon, tilelang"),
        (["generate", "--op", "quantize", "--backend", "gluon"], 2, "no configuration of quantize (gluon)"),
        (["generate", "--out", "/dev/null/kernels"], 2, "name another place"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_named_with_their_remedy(arguments, code, words):
    shown = cli(*arguments)
    assert (shown.returncode, words in " ".join(shown.stderr.split())) == (code, True), shown.stderr
    assert "Traceback" not in shown.stderr
