"""The script that proves presets: what it counts without a GPU, and what an earlier run leaves it to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
