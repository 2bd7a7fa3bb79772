"""The wings of docs/architecture.md hold: every room listed once, no import upwards or in a circle, serving needs no tuner."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dsa_codegen"
FLOOR = re.compile(r"^\| (\d+) \| (.+?) \|", re.MULTILINE)
TOP_OF_THE_RUNTIME = 8
FOREIGN = {"optuna", "rich", "typer", "matplotlib"}


def floors() -> dict[str, int]:
    """Room -> floor, as the page's table says."""
    table = FLOOR.findall((ROOT / "docs/architecture.md").read_text())
    rooms = [(room, int(floor)) for floor, cell in table for room in re.findall(r"`(\w+)/?`", cell)]
    assert len(dict(rooms)) == len(rooms), "a room is listed twice"
    return dict(rooms)


def room_of(path: Path) -> str:
    """The module, or the folder, directly below the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module, inside functions too; those that only annotate are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from statements(child)


def imports(path: Path) -> tuple[set[Path], set[str]]:
    """(modules of the package, other packages) that a module imports."""
    modules, others = set(), set()
    for statement in statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            others |= {name.name.partition(".")[0] for name in statement.names}
        elif not statement.level:
            others.add((statement.module or "").partition(".")[0])
        else:
            place = path.parents[statement.level - 1].joinpath(*(statement.module or "").split("."))
            inside = {place / name.name for name in statement.names}
            modules |= {file for name in inside if (file := file_of(name))} or {file_of(place)}
    return modules, others


def file_of(module: Path) -> Path | None:
    """The file of a module or package, given its path without an ending; None where it is neither."""
    candidates = (module.with_name(f"{module.name}.py"), module / "__init__.py")
    return next((file for file in candidates if file.exists()), None)


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} == set(floors())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    known, (modules, others) = floors(), imports(path)
    floor = known[room_of(path)]
    rooms = {room_of(module) for module in modules}
    assert not {room: known[room] for room in rooms if known[room] > floor}
    if floor <= TOP_OF_THE_RUNTIME:
        assert not others & FOREIGN


def test_no_circle():
    """Modules that import each other in a ring, at the top or inside functions, cannot be read one after the other."""
    graphlib.TopologicalSorter({path: imports(path)[0] for path in MODULES}).prepare()


def test_serving_loads_no_tuner():
    check = f"import sys, dsa_codegen; sys.exit(', '.join({FOREIGN!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
