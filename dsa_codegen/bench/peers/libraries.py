"""How the libraries of peers are found and loaded, and why one is not there."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

PEER_FOLDER = "DSA_PEER_FOLDER"
"""An environment variable, so that child processes see it too."""


@functools.cache
def loaded(package: str, file: str, distribution: str) -> str | None:
    """Load one shared library of a package, whose own import may need more than is used here; None where it worked.

    Args:
        package: whose folder holds the library; found, never imported.
        file: its path in there; may hold wildcards where the name carries an ABI.
        distribution: the package as the index knows it, for the reason.
    """
    folder = folder_of(package)
    if folder is None:
        return f"{distribution} is not installed"
    path = next(iter(sorted(folder.glob(file))), None)
    if path is None:
        return f"{distribution} has no {file}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # a symbol is missing; an operator has been registered by somebody else
        return f"{path.name} cannot be loaded: {_first_line(error)}"
    return None


@functools.cache
def imported(name: str) -> ModuleType | str:
    """A module, or why it cannot be imported."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    _point_to_cuda()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a foreign library may fail in any way while it is imported
        return f"{name} cannot be imported: {type(error).__name__}: {_first_line(error)}"


@functools.cache
def from_file(package: str, path: str, distribution: str) -> ModuleType | str:
    """A module that stands on its own, from its file: its package, which is not imported, may be a whole engine."""
    folder = folder_of(package)
    if folder is None:
        return f"{distribution} is not installed"
    if not (folder / path).is_file():
        return f"{distribution} has no {path}"
    found = importlib.util.spec_from_file_location(f"{package}_{Path(path).stem}", folder / path)
    assert found is not None and found.loader is not None  # it ends in .py
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # where compilers look for a function's source
    try:
        found.loader.exec_module(module)
    except Exception as error:
        return f"{path} cannot be imported: {type(error).__name__}: {_first_line(error)}"
    return module


def version_of(distribution: str, file: str = "") -> str | None:
    """The installed version; where only files were carried here, a mark of the file that is used; None where nothing is there.

    Args:
        file: one that tells versions apart, as ``package/path``.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        package, _, path = file.partition("/")
        folder = folder_of(package) if package else None
        if folder is None or not (folder / path).is_file():
            return None
        return f"of unknown version (sha1 {hashlib.sha1((folder / path).read_bytes()).hexdigest()[:8]})"


def folder_of(package: str) -> Path | None:
    """Where a package lies, with or without an ``__init__``; it is not imported."""
    found = importlib.util.find_spec(package)
    locations = list(found.submodule_search_locations or ()) if found else []
    return Path(locations[0]) if locations else None


def peer_folder() -> Path | None:
    """The folder with files of peers that are no packages, which ``bench --peer-folder`` named."""
    named = os.environ.get(PEER_FOLDER, "")
    return Path(named) if named else None


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
    """Of what lies behind it, where a wrapper says only that something went wrong."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [""])[0][:200]
