"""What docs/faults.md says is held is held by tests that exist, and that a GPU runs where it says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
SAME, NONE = ("as left", "as on a GPU"), "–"
ON_GPU = re.compile(r"mark\.gpu|DEVICES|ON_GPU|ON_EVERY_DESIGN")


def rows():
    """(kind, the CPU's cell, the GPU's cell) of the page's table."""
    lines = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]
    return [(kind, on_cpu, on_gpu) for kind, _, on_cpu, on_gpu in cells]


def marks(file, test):
    """What stands in front of a test, of its module's marks too; None where there is no such test."""
    tree = ast.parse((ROOT / file).read_text())
    found = next((each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == test), None)
    own = [each for each in tree.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"]
    return None if found is None else "\n".join(map(ast.unparse, [*own, *found.decorator_list]))


def test_every_kind_names_tests_that_exist_on_the_cpu_and_on_a_gpu():
    assert len(rows()) >= 37
    for kind, on_cpu, on_gpu in rows():
        assert NAMED.findall(on_cpu) or on_cpu == SAME[1], kind
        assert NAMED.findall(on_gpu) or on_gpu == NONE, kind
        for file, test in NAMED.findall(on_cpu):
            assert marks(file, test) is not None, f"{file}::{test}"
        for file, test in NAMED.findall(on_gpu):
            assert ON_GPU.search(marks(file, test) or ""), f"{file}::{test} does not run on a GPU"
