"""What is here and what is missing: GPU, compilers, packages, cache, records, each with the way to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import gpu, paths
from ..errors import DsaError, ToolMissing
from ..kernels import backends
from ..kernels.backends.base import C_COMPILER


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    what: str
    state: str
    ok: bool
    remedy: str = ""


def diagnose() -> Iterator[Finding]:
    """Look at everything the package can use. A finding that is not ``ok`` says what to do."""
    yield Finding("python", platform.python_version(), True)
    yield from _gpus()
    for name in backends.NAMES:
        yield _backend(name)
    yield _c_compiler()
    yield _package("optuna", "tuning", "pip install 'dsa-codegen[tune]'")
    yield Finding("templates", f"{len(list(paths.templates().glob('*/*.py.jinja')))} in {paths.templates()}", True)
    yield Finding("shipped records", str(paths.shipped_records()), paths.shipped_records().is_dir(), "reinstall the package")
    yield Finding("own records", str(paths.user_records() or "DSA_TUNED_DIR is not set"), True)
    yield Finding("build cache", str(paths.cache()), True)


def _gpus() -> Iterator[Finding]:
    """One finding per visible device, or one that says that there is none."""
    offline = "kernels run on their CPU reference here; name a GPU to compile for one: --gpu H100"
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not devices:
        yield Finding("GPU", "none visible", False, offline)
    for device in range(devices):
        what = "GPU" if devices == 1 else f"GPU {device}"
        try:
            found = gpu.detect(device)
        except DsaError as error:
            yield Finding(what, str(error), False, "correct or unset DSA_GPU")
            continue
        if found is None:
            yield Finding(what, f"{torch.cuda.get_device_name(device)} is older than sm_80", False, offline)
        else:
            yield Finding(what, f"{found.name} ({found.arch}, {found.sms} SMs), id {found.id}", True)


def _backend(name: str) -> Finding:
    try:
        versions = backends.get(name).toolchain()
    except ToolMissing as error:
        return Finding(name, error.state, False, error.remedy)
    return Finding(name, ", ".join(f"{tool} {version}" for tool, version in versions.items()), True)


def _c_compiler() -> Finding:
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return Finding("C compiler", found or "not found", bool(found), C_COMPILER)


def _package(name: str, use: str, remedy: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed ({use})", False, remedy)
