"""How the libraries of peers are found and loaded, and why one is not there."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch


@functools.cache
def sgl_kernel(file: str) -> str | None:
    """Load one shared library of sglang-kernel, whose own import needs more than is used here; None where it worked."""
    found = importlib.util.find_spec("sgl_kernel")
    if found is None or not found.submodule_search_locations:
        return "sglang-kernel is not installed"
    path = Path(next(iter(found.submodule_search_locations))) / file
    if not path.exists():
        return f"sglang-kernel has no {file}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{file} cannot be loaded: {_first_line(error)}"
    return None


@functools.cache
def imported(name: str) -> ModuleType | str:
    """A module, or why it cannot be imported."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    _point_to_cuda()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a foreign library may fail in any way while it is imported
        return f"{name} cannot be imported: {type(error).__name__}: {_first_line(error)}"


def _point_to_cuda() -> None:
    """Peers that compile at run time look for a toolkit in CUDA_HOME."""
    usual = Path("/usr/local/cuda")
    if "CUDA_HOME" not in os.environ and usual.exists():
        os.environ["CUDA_HOME"] = str(usual)


def needs_gpu(capability: int | None = None) -> str | None:
    """Why there is no such GPU; None where there is."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if capability is not None and 10 * major + minor < capability:
        return f"needs sm_{capability} or newer"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
