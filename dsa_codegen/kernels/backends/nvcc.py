"""nvcc: where it is, which version, and what it said; for the backends that compile by it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
from pathlib import Path

from ...errors import ToolMissing
from ...invocation import install
from .base import report_of

REMEDY = (
    f"TileLang and CUDA C++ are compiled by it: {install('tilelang')} brings one, or install the CUDA toolkit (12.8 or newer) "
    "and put nvcc on the PATH or name the toolkit's folder in CUDA_HOME"
)
_VERSION = re.compile(r"release ([\d.]+)")
_TOOLKIT = Path("/usr/local/cuda")


def find() -> Path:
    """The compiler that TileLang calls too (it looks in this order), found without importing TileLang, which takes seconds.

    CUDA_HOME's or CUDA_PATH's, else the PATH's, pip's, and at last that of ``/usr/local/cuda``.

    Raises:
        ToolMissing: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return checked(Path(home, "bin", "nvcc"))
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    found = _of_pip() or _TOOLKIT / "bin" / "nvcc"
    if not found.exists():
        raise ToolMissing("nvcc", REMEDY)
    return found


def _of_pip() -> Path | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-nvcc") or ():
            if file.name == "nvcc":
                return Path(str(file.locate()))
    return None


def checked(compiler: str | Path) -> Path:
    """The compiler at a place that was named.

    Raises:
        ToolMissing: it is not there.
    """
    if not os.path.exists(compiler):
        raise ToolMissing(f"nvcc at {compiler}", REMEDY)
    return Path(compiler)


def version(compiler: str | Path) -> str:
    """ "13.0", "unknown" where the compiler does not say.

    Raises:
        ToolBroken: it cannot be run.
    """
    found = _VERSION.search(report_of(compiler, "--version", remedy=REMEDY))
    return found.group(1) if found else "unknown"


def telling_line(report: str) -> str:
    """The first line of a compiler's report that tells of an error, else its first line; "" where it said nothing."""
    lines = [line for line in report.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return next(iter(telling or lines), "").strip()[:300]
