"""What the README tells people to install resolves on the public package index alone, for every torch and Python it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRITON = {"2.11.0": "3.6", "2.13.0": "3.7", "2.14.1": "3.8"}
"""torch -> the Triton that it brings."""
EXTRAS = {"main": ("tune", "tilelang"), "test": ("test",)}
"""What the README's two commands install."""


def resolved(extras: tuple[str, ...], constraints: Path, python: str = "3.10") -> subprocess.CompletedProcess:
    """Resolve for this Python and all later ones from the index's metadata alone: no local wheels, no configuration."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-config",
        "--no-annotate",
        "--only-binary",
        ":all:",
    ]
    command += ["--universal", "--python-version", python, "--constraints", str(constraints)]
    command += [part for extra in extras for part in ("--extra", extra)]
    return subprocess.run([*command, ROOT / "pyproject.toml"], capture_output=True, text=True, env=variables, timeout=300)


def test_the_commands_install_what_is_resolved_here():
    """The extras above are those of the README, and its constraints are these."""
    commands = re.findall(r"pip install -q -c constraints\.txt -e '\.\[([a-z,]+)\]'", (ROOT / "README.md").read_text())
    assert [tuple(extras.split(",")) for extras in commands] == list(EXTRAS.values())


@pytest.mark.parametrize("torch", TRITON)
def test_it_resolves_on_the_public_index(tmp_path, torch):
    """The second command's extras hold the first one's."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("torch==", "triton=="))]
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join([*(lines if f"torch=={torch}" in lines else [*kept, f"torch=={torch}"]), ""]))
    done = resolved(EXTRAS["test"], constraints)
    assert done.returncode == 0, done.stderr
    assert f"torch=={torch}" in done.stdout
    assert re.search(rf"^triton=={re.escape(TRITON[torch])}\.", done.stdout, re.MULTILINE)


def test_older_drivers_have_an_extra_without_a_compiler_of_cuda_13(tmp_path):
    (tmp_path / "torch.txt").write_text("torch==2.13.0\n")
    done = resolved(("tilelang-cu12",), tmp_path / "torch.txt")
    assert done.returncode == 0, done.stderr
    assert "tilelang==" in done.stdout
    assert "nvidia-cuda-nvcc" not in done.stdout


def test_what_several_hosts_tune_by_resolves_too(tmp_path):
    (tmp_path / "none.txt").write_text("")
    done = resolved(("ray", "postgres"), tmp_path / "none.txt", python="3.11")
    assert done.returncode == 0, done.stderr
    assert "\nray==" in done.stdout and "psycopg2-binary==" in done.stdout
