"""Compiled: hits.c as a module of this Python, compiled where it is first needed and kept in the build cache.

As Triton compiles what launches its kernels: with the C compiler of the system, which takes half a second. There is no step of
the installation for it, and without a compiler, without Python's headers, or with ``DSA_NATIVE=0`` calls stay in Python.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from .. import paths

_SOURCE = Path(__file__).with_name("hits.c")
_NAME = "hits"
_OFF = ("0", "false", "no", "off")
_FLAGS = ("-O2", "-std=c11", "-shared", "-fPIC")
_PATIENCE_S = 120.0


class _Unserved(Exception):
    """Why there is no such module here."""


def module() -> ModuleType | None:
    """The module; None where ``state`` says why not. Compiles at the first call, and never raises."""
    return _found()[0]


def state() -> tuple[bool, str]:
    """(whether calls are served in C, where the module lies or what is missing)."""
    found, words = _found()
    return found is not None, words


@functools.cache
def _found() -> tuple[ModuleType | None, str]:
    try:
        _check()
        folders = (paths.prebuilt(), paths.cache())
        for file in (folder / file_name() for folder in folders if folder is not None):
            with contextlib.suppress(ImportError):  # it is not there yet, or is broken, or of a host with another C library
                return _imported(file), str(file)
        _compile(file)
        return _imported(file), str(file)
    except (_Unserved, OSError, ImportError) as error:
        return None, str(error)


def file_name() -> str:
    """The module's, in the build cache and in folders of kernels built ahead: for this Python, of this source."""
    key = hashlib.sha256("\n".join((_SOURCE.read_text(), sys.version, platform.machine(), *_FLAGS)).encode()).hexdigest()
    return f"{_NAME}-{key[:32]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def copy_into(folder: Path) -> None:
    """Put the module where a machine without a compiler finds it (``DSA_BUILDS``); one of another source makes way."""
    for left in folder.glob(f"{_NAME}-*"):
        left.unlink()
    served, words = state()
    if served:
        staging = folder / f".{file_name()}"
        shutil.copyfile(words, staging)
        staging.replace(folder / file_name())


def _check() -> None:
    """Raises _Unserved where no compiler could change it."""
    if os.environ.get("DSA_NATIVE", "").lower() in _OFF:
        raise _Unserved("DSA_NATIVE says not to")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise _Unserved("this Python runs without a global lock")


def _compile(file: Path) -> None:
    """Compile into ``file``, published by a rename: processes that do so at once publish the same."""
    headers = _headers()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hits-", dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        command = [*_compiler(), *_FLAGS, f"-I{headers}", str(_SOURCE), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
        except subprocess.SubprocessError as error:
            raise _Unserved(f"{command[0]}: {error}") from error
        if done.returncode:
            raise _Unserved(f"{command[0]} failed: {done.stderr.strip()[:300]}")
        made.replace(file)


def _headers() -> Path:
    """The folder of Python.h; a distribution's own scheme may name another than where its package of headers puts them."""
    folders = dict.fromkeys(
        Path(str(each)) for each in (sysconfig.get_paths()["include"], sysconfig.get_config_var("INCLUDEPY"))
    )
    for folder in folders:
        if (folder / "Python.h").exists():
            return folder
    raise _Unserved(f"Python's headers are not in {' or '.join(map(str, folders))}: install python3-dev")


def _compiler() -> list[str]:
    """The command that Triton would take."""
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for path in map(shutil.which, ("gcc", "clang", "cc")) if path), None)
    if not named and found is None:
        raise _Unserved("no C compiler: install gcc or clang, or name one in CC")
    return named or [str(found)]


def _imported(file: Path) -> ModuleType:
    loader = ExtensionFileLoader(_NAME, str(file))
    spec = spec_from_loader(_NAME, loader)
    assert spec is not None
    found = module_from_spec(spec)
    loader.exec_module(found)
    return found
