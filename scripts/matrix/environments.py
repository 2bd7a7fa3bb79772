"""Environments of the matrix, one for each Triton and Python, made from the public package index by uv."""

from __future__ import annotations

import os
import subprocess
import sys

from subjects import NVCC, ROOT, TRITONS

PLACE = ROOT / ".matrix"
TORCH = {"3.6": "2.11.0", "3.7": "2.13.0", "3.8": "2.14.1", "3.9": "2.14.1"}
"""Triton -> the torch that brings it; no torch brings 3.9 yet, it is put in its place."""
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
NEWEST = "3.8"
"""The Triton that Pythons are tried with: of the newest torch."""
USUAL = "3.12"
"""The Python that compilers are tried with."""


def made(python: str, compiler: str) -> str:
    """The interpreter of the environment, which is made where it is missing (3 GB the first time: torch with CUDA)."""
    triton = NEWEST if compiler == NVCC else compiler
    folder = PLACE / f"python{python}-triton{triton}"
    inside = folder / "bin" / "python"
    if not (folder / "whole").exists():
        constraints, override = folder / "constraints.txt", folder / "override.txt"
        _uv("venv", "--clear", "--python", python, str(folder))
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        constraints.write_text("\n".join(line for line in lines if not line.startswith(("torch==", "triton=="))) + "\n")
        override.write_text(f"triton=={TRITONS[triton]}\n")
        wanted = [f"torch=={TORCH[triton]}", "-e", f"{ROOT}[tilelang]", "setuptools"]
        _uv("pip", "install", "--python", str(inside), "-c", str(constraints), "--override", str(override), *wanted)
        (folder / "whole").touch()
    return str(inside)


def _uv(*arguments: str) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    subprocess.run([sys.executable, "-m", "uv", *arguments, "--no-config", "--quiet"], check=True, env=variables)
