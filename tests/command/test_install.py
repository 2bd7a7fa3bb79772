"""What the README tells people to install resolves on the public package index alone, for every torch and Python it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRITON = {"2.11.0": "3.6", "2.13.0": "3.7", "2.14.1": "3.8"}
"""torch -> the Triton that it brings."""
EXTRAS = {"main": ("tune", "tilelang"), "test": ("test",)}
"""What the README's two commands install."""


def resolving(extras: tuple[str, ...], constraints: Path, python: str = "3.10") -> subprocess.Popen[str]:
    """Resolve for this Python and all later ones from the index's metadata alone: no local wheels, no configuration."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-annotate"]
    command += ["--only-binary", ":all:", "--universal", "--python-version", python, "--constraints", str(constraints)]
    command += [part for extra in extras for part in ("--extra", extra)]
    command += [str(ROOT / "pyproject.toml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def constrained(path: Path, *lines: str) -> Path:
    """A file of constraints."""
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_commands_install_what_is_resolved_here():
    """The extras above are those of the README, and its constraints are these."""
    commands = re.findall(r"pip install -q -c constraints\.txt -e '\.\[([a-z,]+)\]'", (ROOT / "README.md").read_text())
    assert [tuple(extras.split(",")) for extras in commands] == list(EXTRAS.values())


def test_what_the_documents_name_resolves_on_the_public_index(tmp_path):
    """All at once, for they wait for the index most of the time. The second command's extras hold the first one's."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("torch==", "triton=="))]
    asked = {}
    for torch in TRITON:
        wanted = lines if f"torch=={torch}" in lines else [*kept, f"torch=={torch}"]
        asked[torch] = resolving(EXTRAS["test"], constrained(tmp_path / f"{torch}.txt", *wanted))
    asked["older drivers"] = resolving(("tilelang-cu12",), constrained(tmp_path / "older.txt", "torch==2.13.0"))
    asked["several hosts"] = resolving(("ray", "postgres"), constrained(tmp_path / "none.txt"), python="3.11")
    found = {}
    for name, process in asked.items():
        found[name], said = process.communicate(timeout=300)
        assert process.returncode == 0, (name, said)
    for torch, triton in TRITON.items():
        assert f"torch=={torch}" in found[torch]
        assert re.search(rf"^triton=={re.escape(triton)}\.", found[torch], re.MULTILINE)
    assert "tilelang==" in found["older drivers"]
    assert "nvidia-cuda-nvcc" not in found["older drivers"], "a compiler of CUDA 13, for a driver of CUDA 12"
    assert "\nray==" in found["several hosts"] and "psycopg2-binary==" in found["several hosts"]
