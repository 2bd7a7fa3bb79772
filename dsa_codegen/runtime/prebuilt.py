"""Kernels built ahead: the folder that ``DSA_BUILDS`` names, served with nothing rendered, compiled or looked up in records.

``build`` (``command/prebuild.py``) writes it: ``index.json`` and beside it entries of the build cache. It serves the sources
and the architecture that it was built from, by the packages that it was built with; another folder is refused as a whole,
because a process that silently compiles instead is what such a folder is there to avoid. What the index does not name goes
the ordinary way.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import DsaError, PrebuiltError
from ..gpu import Gpu
from ..invocation import command
from ..kernels import backends
from ..kernels.build import whole
from ..kernels.render import code_of, module_name
from ..ops import all_ops
from ..problem.op import Config, Op
from ..problem.values import Bucket, Spec, bucket_to_json
from ..records.record import GpuKey

SCHEMA = 1
INDEX = "index.json"
FOLDER = re.compile(r"[0-9a-f]{32}")
"""Names of entries."""
_SOURCES = (".jinja", ".py")


@dataclass(frozen=True)
class Entry:
    """What serves one operation, spec and bucket: a config, and the entry of the build cache that holds its kernels."""

    op: str
    config: Config
    source_sha: str
    folder: Path

    def load(self, gpu: Gpu) -> Mapping[str, backends.Launchable]:
        """The kernels by name, loaded on the current CUDA device.

        Raises:
            PrebuiltError: files of the entry are missing, or not as they were built.
            ToolMissing: there is no driver.
        """
        source = self.folder / f"{module_name(self.op, self.config.backend, self.source_sha)}.py"
        if whole(self.folder) is None or _code_sha(source) != self.source_sha:
            raise PrebuiltError(self.folder.parent, f"{self.folder.name} is not as it was built", "copy the folder again")
        return backends.get(self.config.backend).load_ahead(source, gpu, self.folder)


@dataclass(frozen=True)
class Builds:
    """A folder that fits this package and what it is loaded by."""

    folder: Path
    gpu: GpuKey
    loaded_by: Mapping[str, str]
    entries: Mapping[str, Entry]
    """By ``key_of``."""

    def check(self, gpu: Gpu) -> None:
        """Refuse a GPU that the machine code is not for.

        Raises:
            PrebuiltError: it is of another architecture.
        """
        if gpu.arch != self.gpu.arch:
            reason = f"built for {self.gpu.id} ({self.gpu.arch}), here is {gpu.id} ({gpu.arch})"
            raise PrebuiltError(self.folder, reason, _again(gpu.id, self.folder))


def find(op: Op, spec: Spec, bucket: Bucket, gpu: Gpu) -> Entry | None:
    """What ``DSA_BUILDS`` holds for a call; None where it is unset, does not name the call, or breaks a limit of this GPU.

    Raises:
        PrebuiltError: the folder cannot serve here; the message says why and what to do.
    """
    folder = paths.prebuilt()
    if folder is None:
        return None
    builds = opened(folder)
    builds.check(gpu)
    entry = builds.entries.get(key_of(op.name, spec, bucket))
    if entry is None or (builds.gpu != GpuKey.of(gpu) and op.violations(spec, entry.config, gpu, bucket)):
        return None
    return entry


@functools.cache
def opened(folder: Path) -> Builds:
    """The folder's index, read once a process (``opened.cache_clear`` forgets it).

    Raises:
        PrebuiltError: there is no index, it is of another schema, or of other sources or packages than those at hand.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        schema, sources, gpu, loaded_by = index["schema"], index["sources"], GpuKey(**index["gpu"]), dict(index["loaded_by"])
    except OSError as error:
        raise PrebuiltError(folder, f"{INDEX} cannot be read ({error.strerror})", _again("auto", folder)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PrebuiltError(folder, f"{INDEX} is no index of builds", _again("auto", folder)) from error
    again = _again(gpu.id, folder)
    if schema != SCHEMA:
        raise PrebuiltError(folder, f"schema {schema!r}, this version reads {SCHEMA}", again)
    if sources != sources_sha():
        raise PrebuiltError(folder, f"built from other sources ({sources!r}) than this package's ({sources_sha()})", again)
    _check_loaders(folder, loaded_by, again)
    try:
        entries = {_key(each["op"], each["spec"], each["bucket"]): _entry(folder, each) for each in index["entries"]}
    except (ValueError, KeyError, TypeError, AttributeError, DsaError) as error:
        raise PrebuiltError(folder, f"an entry of {INDEX} is not one ({type(error).__name__}: {error})", again) from error
    return Builds(folder, gpu, loaded_by, entries)


def key_of(op: str, spec: Spec, bucket: Bucket) -> str:
    """What an entry is found by."""
    return _key(op, spec.to_dict(), bucket_to_json(bucket))


@functools.cache
def sources_sha() -> str:
    """sha256 (16 digits) of the templates and of the code that renders, builds and launches: a folder serves no other."""
    digest = hashlib.sha256()
    for name, folder in sorted(paths.sources().items()):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
            digest.update(f"{name}/{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def loaders(names: Container[str]) -> dict[str, str]:
    """What kernels of these backends are loaded by, each with its version here: it must be the one that they were built with.

    TileLang finds kernels by its version, and its launcher is machine code of the host. All others are loaded by the driver.
    """
    return {"tilelang": _version("tilelang"), "machine": platform.machine()} if "tilelang" in names else {}


def _check_loaders(folder: Path, stated: Mapping[str, str], again: str) -> None:
    here = loaders(stated)  # each is the name of a backend too
    for name, version in stated.items():
        if here.get(name) != version:
            remedy = f"install {name} {version}, or {again}" if name != "machine" else again
            raise PrebuiltError(folder, f"loaded by {name} {version}, here is {here.get(name)}", remedy)


def _entry(folder: Path, stated: Mapping[str, Any]) -> Entry:
    op, build, sha = all_ops()[stated["op"]], stated["build"], stated["source_sha"]
    if not (FOLDER.fullmatch(build) and re.fullmatch("[0-9a-f]{64}", sha)):
        raise ValueError(f"build {build!r} of source {sha!r}")
    return Entry(op.name, op.config(stated["backend"], stated["config"]), sha, folder / build)


def _key(op: str, spec: Mapping[str, Any], bucket: Mapping[str, Any]) -> str:
    return json.dumps([op, spec, bucket], sort_keys=True)


def _code_sha(source: Path) -> str:
    try:
        return hashlib.sha256(code_of(source.read_text()).encode()).hexdigest()
    except (OSError, ValueError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _again(gpu: str, folder: Path) -> str:
    return f"build it again with this package: {command()} build --gpu {gpu} --preset <your model> --out {folder}"
