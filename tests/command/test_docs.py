"""The documents' examples run, and the command line does what the documents say."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen.records import lookup

from command_line import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/usage.md", "docs/engines.md", "docs/training.md", "docs/quality.md", "docs/shapes.md"]
COMMAND_PAGES = [*PAGES, "docs/benchmark.md", "docs/performance.md", "docs/tuning.md"]
COMMAND_PAGES += [f"docs/performance-{part}.md" for part in ("selection", "prefill", "decode")]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", [*PAGES, "docs/models.md"])
def test_python_examples_run(page, capsys):
    if page == "docs/models.md":
        pytest.importorskip("transformers", reason="the page is about transformers, which is not installed")
    namespace: dict = {}
    examples = PYTHON.findall((ROOT / page).read_text())
    assert examples
    try:
        for example in examples:
            exec(compile(example, page, "exec"), namespace)
    finally:
        lookup.follow({})  # a page has this process follow a rank's records


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


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page):
    for path, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), f"{path}#{heading}"


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
    rows = json.loads(shown.stdout)
    assert rows
    for row in rows:
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
        (["tune", "--op", "quantize", "--backend", "gluon"], 2, "triton"),
        (["explain", "--op", "indexer", "queries=many"], 2, "whole number"),
        (["explain", "--op", "indexer", "rows=1"], 2, "queries, context"),
        (["bench"], 3, "--gpu H100"),
        (["verify", "--gpu", "a100", "--op", "indexer"], 2, "sm_89"),
        (["generate", "--backend", "hip"], 2, "triton, gluon, tilelang, cuda"),
        (["generate", "--op", "quantize", "--backend", "gluon"], 2, "no configuration of quantize (gluon)"),
        (["generate", "--out", "/dev/null/kernels"], 2, "name another place"),
        (["generate", "--out", ""], 2, "nothing is named"),
        (["build", "--out", "/dev/null/kernels"], 2, "/dev/null is not a folder"),
        (["build", "--gpu", "a100", "--op", "indexer"], 2, "sm_89"),
        (["tune", "--folder", ""], 2, "nothing is named"),
        (["tune", "--folder", "/dev/null/tuned"], 2, "/dev/null is not a folder"),
        (["tune", "--seed", "99999999999999999"], 2, "--seed"),
        (["tune", "--every"], 2, "only with --refresh"),
        (["tune", "--refresh", "--seed", "1"], 2, "only without --refresh"),
        (["explain", "--op", "select", "rows=64", "columns=9", "rows=65"], 2, "rows=64 was given before"),
        (["explain", "--op", "select", f"rows={'9' * 5000}"], 2, "below 10^15"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else None,
)
def test_mistakes_are_named_with_their_remedy(arguments, code, words):
    shown = cli(*arguments, DSA_TUNED_DIR="")
    assert (shown.returncode, words in " ".join(shown.stderr.split())) == (code, True), shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_budget_that_is_too_short_names_what_is_missing(tmp_path):
    """One of the operations asked for has no record: an exit code of its own, and the command that gets it."""
    wanted = ["--gpu", "h200", "--preset", "tiny", "--op", "select"]
    shown = cli("tune", *wanted, "--budget", "0.001s", "--folder", "records", cwd=tmp_path)
    said = " ".join(shown.stderr.split())
    assert shown.returncode == 4, said
    assert "no record for select" in said and "the budget ended before its default was timed" in said
    assert "python cli.py tune --gpu h200 --preset tiny --op select --budget 4m" in said


def test_refresh_without_a_gpu_says_what_is_left(tmp_path):
    """A stale record of a GPU that is not here: left and said with an exit code, or dropped where that is asked for."""
    shutil.copytree(ROOT / "tuned" / "h100", tmp_path / "h100")
    path = tmp_path / "h100" / "select.json"
    path.write_text(re.sub(r'"source_sha": "\w{4}', '"source_sha": "0000', path.read_text()))
    shown = cli("tune", "--refresh", "--op", "select", "--folder", str(tmp_path))
    assert shown.returncode == 4, shown.stderr
    assert "left: h100 select" in shown.stdout and "--drop-stale" in shown.stdout
    dropped = cli("tune", "--refresh", "--op", "select", "--folder", str(tmp_path), "--drop-stale", "--json")
    assert dropped.returncode == 0, dropped.stderr
    assert {row["fate"] for row in json.loads(dropped.stdout)} == {"dropped"}
    assert not path.exists() and (tmp_path / "h100" / "quantize.json").exists()
