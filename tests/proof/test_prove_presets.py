"""The script that proves presets: what it counts without a GPU, and what an earlier run leaves it to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen import ops
from dsa_codegen.command.verification import Subject
from scripts import prove_presets

from support import H200

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [
    sys.executable,
    ROOT / "scripts" / "prove_presets.py",
    "--own",
    "--gpu",
    "H100",
    "--preset",
    "tiny",
    "--op",
    "quantize",
]


def subject(width=128):
    op = ops.get("quantize")
    spec = op.spec_type(width)
    return Subject(op, spec, op.default_config(spec, op.workloads(spec)[0].sizes, H200, "triton"))


def kept(tmp_path, **change):
    """The earlier run's file of one check that passed, with a row that is changed."""
    row = prove_presets.row_of(subject(), [])
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"rows": [{**row, **change}]}))
    return prove_presets.earlier(file)


def test_an_earlier_check_counts_while_its_text_is_the_same(tmp_path):
    check = prove_presets.key_of(subject())
    grown = {name: value for name, value in subject().spec.to_dict().items() if name == "width"}
    assert list(kept(tmp_path)) == list(kept(tmp_path, spec=grown)) == [check]
    assert check not in kept(tmp_path, text="another template's") and not kept(tmp_path, wrong="run: out")
    assert check != prove_presets.key_of(subject(64))


def test_counts_are_written_into_the_pages_table():
    page = "before\n<!-- presets -->\n| `old` | a latent | 1 | 1 | 1 | 1 | 1 |\n<!-- /presets -->\nafter\n"
    own, every = {"checks": 2, "passed": 1, "cases": 7}, {"checks": 5, "passed": 3, "cases": 9}
    written = prove_presets.paged(page, {"old": own, "new": own}, {"old": every, "new": every})
    assert written.startswith("before\n<!-- presets -->\n| preset |") and written.endswith("|\n<!-- /presets -->\nafter\n")
    assert "| `old` | a latent | 2 | 1 | 5 | 3 | 9 |\n| `new` |  | 2 | 1 | 5 | 3 | 9 |\n" in written


@pytest.mark.slow
def test_without_a_gpu_checks_are_compiled_and_interpreted_once(tmp_path):
    file = tmp_path / "found.json"
    done = subprocess.run([*SCRIPT, "--json", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    counts = found["presets"]["tiny"]
    assert counts["passed"] == counts["checks"] == len(found["rows"]) > 0 == counts["left"]
    assert all(row["cases"] > 1 for row in found["rows"]), "interpreted, too"
    again = subprocess.run([*SCRIPT, "--after", file], capture_output=True, text=True)
    assert again.returncode == 0 and "\n0 checks of 1 presets for h100" in again.stdout
