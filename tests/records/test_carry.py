"""Carrying records over a change of templates: proven before it is written, refused where the code differs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen.records.record import pretty

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("dsa_codegen", "templates", "scripts", "tuned/h100/gather_paged.json")
TEMPLATE = "templates/gather_paged/triton.py.jinja"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what rendering needs, with the records of one operation."""
    for part in PARTS:
        source, target = ROOT / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copy(source, target) if source.is_file() else shutil.copytree(source, target, ignore=ignored)
    return tmp_path


def carry(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Carry the copy's records from this checkout."""
    command = [sys.executable, checkout / "scripts/carry_records.py", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_template_that_only_reads_differently_keeps_its_records(checkout):
    template, records = checkout / TEMPLATE, checkout / PARTS[-1]
    template.write_text("{# what a reader is told #}\n" + template.read_text())
    before = json.loads(records.read_text())
    before["records"][0]["default_sha"] = "0" * 64  # of another default than today's: for a refresh to see
    records.write_text(pretty(before) + "\n")
    said = carry(checkout, "--write")
    assert said.returncode == 0, said.stderr
    after = json.loads(records.read_text())
    assert f"{len(before['records'])} records carried" in said.stdout
    for old, new in zip(before["records"], after["records"], strict=True):
        assert {name for name in old if old[name] != new[name]} == {"template"}
    assert "0 records carried" in carry(checkout, "--write").stdout


def test_records_of_other_code_stay_as_they_are_and_are_named(checkout):
    template, records = checkout / TEMPLATE, checkout / PARTS[-1]
    template.write_text(template.read_text() + "# another line of code\n")
    before = records.read_text()
    said = carry(checkout, "--write")
    assert said.returncode == 1
    assert "gather_paged.json, record 0: its code changed" in said.stderr
    assert records.read_text() == before
