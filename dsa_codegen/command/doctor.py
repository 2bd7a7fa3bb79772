"""What is here and what is missing: GPU, compilers, packages, cache, records, each with the way to get it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import gpu, ops, paths
from ..errors import DsaError, OverrideError, PrebuiltError, ToolMissing
from ..invocation import install
from ..kernels import backends
from ..kernels.backends import nvcc
from ..kernels.backends.base import C_COMPILER
from ..records import files, overrides
from ..records.lookup import missing_tool, toolchain_difference
from ..runtime import compiled, prebuilt


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
    yield from _nvcc_for_driver()
    yield _c_compiler()
    yield _calls()
    yield _package("optuna", "tuning", install("tune"))
    yield Finding("templates", f"{len(list(paths.templates().glob('*/*.py.jinja')))} in {paths.templates()}", True)
    yield from _shipped_records()
    yield from _own_records()
    yield _overrides()
    yield _prebuilt()
    yield _cache()


def _gpus() -> Iterator[Finding]:
    """One finding per visible device, or one that says that there is none."""
    offline = "kernels run on their CPU reference here; name a GPU to compile for one: --gpu H100"
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not devices:
        yield Finding("GPU", "none visible", False, offline)
        yield from _named_gpu()
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


def _named_gpu() -> Iterator[Finding]:
    """DSA_GPU, where no device asks for it: unknown, it is an error on the day when one does."""
    named = os.environ.get("DSA_GPU")
    if named:
        try:
            gpu.resolve(named)
        except DsaError as error:
            yield Finding("DSA_GPU", str(error), False, "correct or unset DSA_GPU")


def _shipped_records() -> Iterator[Finding]:
    folder = paths.shipped_records()
    yield Finding("shipped records", str(folder), folder.is_dir(), "reinstall the package")
    yield from _files("shipped records", folder)
    yield from _compilers_of_records(folder)


def _compilers_of_records(folder: Path) -> Iterator[Finding]:
    """What the compilers here mean for the records: of another version they are used all the same, and called stale."""
    found = [record for name in ops.all_ops() for record in files.read_all(folder, name)]
    able = [record for record in found if record.backend in backends.NAMES and not missing_tool(record.backend)]
    stale = Counter(toolchain_difference(record) for record in able)
    for difference, count in stale.items():
        state = f"{count} of {len(found)} were tuned with {difference}: used, and marked stale"
        yield Finding(
            "records' compilers", state if difference else f"{count} of {len(found)} were tuned with those here", True
        )


def _nvcc_for_driver() -> Iterator[Finding]:
    """Code of a newer CUDA than the driver's may not load: compared where both are here."""
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)  # a torch for CPUs alone has no such function
    driver = asked() if asked is not None and torch.cuda.is_available() else 0
    with contextlib.suppress(ToolMissing):
        compiler = nvcc.version(nvcc.find())
        fits = not driver or int(compiler.partition(".")[0]) <= driver // 1000
        if driver:
            here = f"nvcc {compiler}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
            remedy = "update the driver, or put an nvcc of the driver's CUDA on the PATH or in CUDA_HOME (extra tilelang-cu12)"
            yield Finding("nvcc for the driver", here, fits, remedy)


def _own_records() -> Iterator[Finding]:
    folder = paths.user_records()
    if folder is None:
        yield Finding("own records", "DSA_TUNED_DIR is not set", True)
    elif not folder.exists():
        remedy = f"mkdir -p {folder}, or correct or unset DSA_TUNED_DIR"
        yield Finding("own records", f"DSA_TUNED_DIR = {folder} is not there", False, remedy)
    elif not folder.is_dir():
        yield Finding(
            "own records", f"DSA_TUNED_DIR = {folder} is not a folder", False, "name a folder, or unset DSA_TUNED_DIR"
        )
    else:
        yield Finding("own records", str(folder), True)
        yield from _files("own records", folder)


def _files(what: str, folder: Path) -> Iterator[Finding]:
    """The files below a folder that no lookup can read, whole or in part: they count as misses there."""
    for path in sorted(folder.glob("*/*.json")):
        for complaint in files.complaints(path):
            yield Finding(what, complaint, False, f"restore or move away {path}, or tune into another --folder")


def _overrides() -> Finding:
    what, file = "configs by hand", paths.overrides()
    if file is None:
        return Finding(what, "DSA_OVERRIDES is not set", True)
    try:
        return Finding(what, f"{len(overrides.read(file))} in {file}: they come before all records", True)
    except OverrideError as error:
        return Finding(what, f"{file}: {error.reason}", False, "correct the file, or unset DSA_OVERRIDES")


def _prebuilt() -> Finding:
    what, folder = "kernels built ahead", paths.prebuilt()
    if folder is None:
        return Finding(what, "DSA_BUILDS is not set", True)
    try:
        builds = prebuilt.opened(folder)
        here = gpu.detect()
        if here is not None:
            builds.check(here)
    except PrebuiltError as error:
        return Finding(what, f"{folder}: {error.reason}", False, f"{error.remedy}, or unset DSA_BUILDS")
    except DsaError:  # of DSA_GPU, which has a finding of its own
        pass
    needed = [f"{name} {version}" for name, version in builds.loaded_by.items() if name != "machine"]
    state = f"{len(builds.entries)} calls for {builds.gpu.id} ({builds.gpu.arch}) in {folder}"
    return Finding(what, f"{state}; loading takes {', '.join(needed) or 'the driver alone'}", True)


def _cache() -> Finding:
    folder = paths.cache()
    reason = paths.unwritable(folder)
    state = f"{folder} cannot be written ({reason})" if reason else str(folder)
    return Finding("build cache", state, not reason, "make it writable, or name another folder in DSA_CACHE_DIR")


def _backend(name: str) -> Finding:
    try:
        versions = backends.get(name).toolchain()
    except ToolMissing as error:
        return Finding(name, error.state, False, error.remedy)
    return Finding(name, ", ".join(f"{tool} {version}" for tool, version in versions.items()), True)


def _c_compiler() -> Finding:
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return Finding("C compiler", found or "not found", bool(found), C_COMPILER)


def _calls() -> Finding:
    """Which way a call like an earlier one goes: both are right, one takes the host longer."""
    served, words = compiled.state()
    return Finding("calls", f"in C: {words}" if served else f"in Python: {words}", True)


def _package(name: str, use: str, remedy: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed ({use})", False, remedy)
