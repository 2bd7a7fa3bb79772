"""The build cache: a rendered source and its binaries under one key, published by an atomic rename, rebuilt when corrupt.

An entry is a folder ``<cache>/<key>/`` with the rendered module (a person can read, import and step through it), the
backend's binaries and ``build.json``. The key hashes the code, the compiler's versions and the architecture, so entries
are never changed, only added.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import BuildError, DsaError, InputError
from ..gpu import Gpu
from ..worker import Worker
from . import backends
from .render import Rendered, code_of

_QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""A compiler's process needs no GPU, and one core."""
_BY_NVCC = ("cuda", "tilelang")
_FORMAT = "2"
"""Of an entry: what is written beside the machine code."""


@dataclass(frozen=True)
class Built:
    """One entry of the build cache."""

    rendered: Rendered
    gpu: Gpu
    folder: Path
    resources: Mapping[str, backends.Resources]

    @property
    def source(self) -> Path:
        """The rendered module."""
        return self.folder / f"{self.rendered.module_name}.py"

    def load(self) -> Mapping[str, backends.Launchable]:
        """The kernels by name, loaded on the current CUDA device."""
        return backends.get(self.rendered.backend).load(self.source, self.gpu, self.folder)


@functools.cache
def _toolchain(backend: str) -> str:
    return json.dumps(backends.get(backend).toolchain(), sort_keys=True)


def preload(names: Iterable[str]) -> None:
    """Import compilers and ask for their versions, ahead of processes that are forked from this one; what lacks is left out."""
    for name in names:
        try:
            _toolchain(name)
        except (ImportError, DsaError):
            continue


def folder_of(rendered: Rendered, gpu: Gpu) -> Path:
    """Where the entry of this source for this GPU lies, built or not."""
    key = hashlib.sha256("\n".join((rendered.code, _toolchain(rendered.backend), gpu.arch, _FORMAT)).encode()).hexdigest()
    return paths.cache() / key[:32]


def find(rendered: Rendered, gpu: Gpu) -> Built | None:
    """The entry, where it is there and whole."""
    folder = folder_of(rendered, gpu)
    report = whole(folder)
    try:
        resources = {name: backends.Resources(**values) for name, values in (report or {})["resources"].items()}
        same = code_of((folder / f"{rendered.module_name}.py").read_text()) == rendered.code
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Built(rendered, gpu, folder, resources) if same else None


def whole(folder: Path) -> Mapping[str, Any] | None:
    """What an entry's ``build.json`` says, where every file that it names is there as it was written; else None."""
    try:
        report: Mapping[str, Any] = json.loads((folder / "build.json").read_text())
        same = all(_digest(folder / name) == digest for name, digest in report["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if same else None


def build(rendered: Rendered, gpu: Gpu) -> Built:
    """The entry, compiled where it is missing. Safe when several processes build the same source at once.

    Raises:
        BuildError: the compiler refused the source, or what it made needs more shared memory than a block has.
        ToolMissing: the backend's compiler is not installed.
    """
    built = find(rendered, gpu) or _build(rendered, gpu)
    for kernel, usage in built.resources.items():
        if usage.smem > gpu.smem_per_block:  # constraints foresee it; where one does not, the next guess serves
            reason = f"{kernel} needs {usage.smem} bytes of shared memory, {gpu.name} has {gpu.smem_per_block}"
            raise BuildError(rendered.module_name, reason)
    return built


def build_all(sources: Iterable[Rendered], gpu: Gpu, processes: int | None = None) -> dict[str, str]:
    """Build sources in parallel, each once; returns the reason of each failure by the source's sha.

    A source that is missing from the cache afterwards (it failed, or took its compiler down) can still be built alone.

    Args:
        processes: compilers that run at once; by default one per core.

    Raises:
        InputError: less than one process.
    """
    if processes is not None and processes < 1:
        raise InputError("processes", str(processes), "1 or more")
    missing = {rendered.sha: rendered for rendered in sources if find(rendered, gpu) is None}
    if not missing:
        return {}
    # nvcc's take longest and are taken first, from the end, so that none is left when the other processes are done.
    waiting = deque(sorted(missing.values(), key=lambda rendered: (rendered.backend in _BY_NVCC, rendered.backend)))
    workers = [Worker(_QUIET) for _ in range(min(processes or len(os.sched_getaffinity(0)), len(missing)))]
    outcomes: dict[str, str] = {}
    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            list(threads.map(lambda worker: _build_waiting(waiting, gpu, worker, outcomes), workers))
        except BaseException:  # Ctrl-C: the threads wait for their children, which do not hear it
            waiting.clear()
            for worker in workers:
                worker.terminate()
            raise
    return {sha: reason for sha, reason in outcomes.items() if reason}


def _build_waiting(waiting: deque[Rendered], gpu: Gpu, worker: Worker, outcomes: dict[str, str]) -> None:
    with worker:
        while True:
            try:
                rendered = waiting.pop()
            except IndexError:
                return
            try:
                outcomes[rendered.sha] = worker.call(_build_quietly, rendered, gpu)
            except DsaError as error:
                outcomes[rendered.sha] = str(error)


def _build_quietly(rendered: Rendered, gpu: Gpu) -> str:
    try:
        build(rendered, gpu)
    except DsaError as error:
        return str(error)
    return ""


def _build(rendered: Rendered, gpu: Gpu) -> Built:
    final = folder_of(rendered, gpu)
    staging = final.with_name(f".staging-{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        source = staging / f"{rendered.module_name}.py"
        source.write_text(rendered.text)
        resources = backends.get(rendered.backend).compile(source, gpu, staging)
        usages = {name: asdict(usage) for name, usage in resources.items()}
        report = {"arch": gpu.arch, "resources": usages, "files": _digests(staging)}
        (staging / "build.json").write_text(json.dumps(report, indent=1))
        _publish(staging, final, rendered, gpu)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    built = find(rendered, gpu)
    if built is None:
        raise BuildError(rendered.module_name, f"the build cache at {final} cannot be written or read")
    return built


def _digests(folder: Path) -> dict[str, str]:
    """What the entry must hold to be whole; Python's own cache of the module aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _publish(staging: Path, final: Path, rendered: Rendered, gpu: Gpu) -> None:
    """Rename into place. A whole entry of another process wins; a corrupt one makes way."""
    for _ in range(3):
        try:
            staging.rename(final)
            return
        except OSError:
            if find(rendered, gpu) is not None:
                return
            shutil.rmtree(final, ignore_errors=True)
