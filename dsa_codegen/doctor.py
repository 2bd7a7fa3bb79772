"""What is here and what is missing: GPU, compilers, packages, cache, records, each with the way to get it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from . import backends, gpu, paths
from .errors import DsaError


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
    yield _gpu()
    for name in backends.NAMES:
        yield _backend(name)
    yield _package("optuna", "tuning", "pip install 'dsa-codegen[tune]'")
    yield Finding("templates", f"{len(list(paths.templates().glob('*.py.jinja')))} in {paths.templates()}", True)
    yield Finding("shipped records", str(paths.shipped_records()), paths.shipped_records().is_dir(), "reinstall the package")
    yield Finding("own records", str(paths.user_records() or "DSA_TUNED_DIR is not set"), True)
    yield Finding("build cache", str(paths.cache()), True)


def _gpu() -> Finding:
    found = gpu.detect()
    if found is None:
        remedy = "kernels run on their CPU reference here; name a GPU to compile for one: --gpu H100"
        return Finding("GPU", "none visible", False, remedy)
    return Finding("GPU", f"{found.name} ({found.arch}, {found.sms} SMs), id {found.id}", True)


def _backend(name: str) -> Finding:
    try:
        versions = backends.get(name).toolchain()
    except (ImportError, DsaError) as error:
        extra = "[tilelang]" if name == "tilelang" else ""
        return Finding(name, f"cannot compile: {error}", False, f"pip install 'dsa-codegen{extra}'")
    return Finding(name, ", ".join(f"{tool} {version}" for tool, version in versions.items()), True)


def _package(name: str, use: str, remedy: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed ({use})", False, remedy)
