"""CUDA C++: a rendered module's source text, compiled by nvcc and launched through the driver; no compiler is needed to load.

A module states ``SOURCE``, the text, and ``KERNELS = {kernel: {args, threads, smem, cluster, pdl}}`` for the text's
``extern "C" __global__`` functions: ``args`` are the kinds of their parameters in order ("ptr", "i32", "u32", "i64", "u64",
"f32", "f64", "map"), ``threads`` those of a block, ``smem`` its dynamic bytes, ``cluster`` the blocks of a cluster (along x),
and ``pdl`` says whether a launch may overlap the kernel before it. A "map" is the descriptor of a matrix of which TMA loads
tiles, for which a launch gives a ``Tiled``; ``tiles`` states what such a tile is, of each in order: ``{of, box, swizzle}``, the
type of an element ("u8", "bf16", "f32"), how many along each dimension, and the bytes of a swizzled row (0, 32, 64, 128).

The language is for what ends at the edge of a block in the others: clusters, the shared memory of a neighbour, registers that
warps hand to each other; and for products whose number of columns is no power of two.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import BuildError
from ...gpu import Gpu
from . import nvcc
from .base import Backend, Launchable, Resources, cubin_usage, import_module
from .cubin import encode
from .descriptors import Views
from .driver import CudaKernel, Recipe, load_module

TEXT, BINARY, _REPORT = "kernels.cu", "kernels.cubin", "kernels.log"
_SMEM_OF_THE_SYSTEM = 1024
_ELEMENTS = {"u8": (0, 1), "bf16": (10, 2), "f32": (7, 4)}  # Triton's number of a type, as ``cubin`` takes it; bytes
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle


class CudaBackend(Backend):
    """See the module's first lines."""

    name = "cuda"

    def toolchain(self) -> dict[str, str]:
        return {"nvcc": nvcc.version(nvcc.find())}

    def compile(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Resources]:
        module = import_module(source)
        (out / TEXT).write_text(module.SOURCE)
        run = subprocess.run(command(gpu, out), capture_output=True, text=True)
        report = run.stdout + run.stderr
        if run.returncode:
            raise BuildError(f"{source.stem} for {gpu.arch}", nvcc.telling_line(report) or f"exit status {run.returncode}")
        (out / _REPORT).write_text(report)  # the assembler's warnings: products that it serialised, say
        usage = cubin_usage(out / BINARY)
        return {kernel: _resources(usage[kernel], facts, gpu) for kernel, facts in module.KERNELS.items()}

    def load(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Launchable]:
        kernels = import_module(source).KERNELS
        loaded = load_module((out / BINARY).read_bytes())
        return {kernel: kernel_of(loaded, kernel, facts) for kernel, facts in kernels.items()}


def kernel_of(loaded: c_void_p, name: str, facts: Mapping[str, Any]) -> CudaKernel:
    """A kernel of a loaded module, as its KERNELS state it."""
    plain = {fact: value for fact, value in facts.items() if fact != "tiles"}
    tiles = facts.get("tiles", ())
    return TiledKernel(loaded, name, tiles, **plain) if tiles else CudaKernel(loaded, name, **plain)


class TiledKernel(CudaKernel):
    """One with arguments of which TMA loads tiles.

    Args:
        tiles: of each such argument, as KERNELS states them.
        others: see ``CudaKernel``.
    """

    def __init__(
        self, module: c_void_p, name: str, tiles: Sequence[Mapping[str, Any]], args: Sequence[str], **others: Any
    ) -> None:
        super().__init__(module, name, args, **others)
        self._described = tuple([described(tile) for tile in tiles])
        self._views = Views([place for place, kind in enumerate(args) if kind == "map"], self._described, _descriptor)
        if not self._views.known:
            raise ValueError(f"{name}: {len(tiles)} tiles of {args.count('map')} descriptors")

    @property
    def recipe(self) -> Recipe | None:
        plain = super().recipe
        return plain and replace(plain, described=self._described, followed=False)

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        super().__call__(grid, self._views(args))

    def bound(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        launch, views = super().bound(grid), self._views
        return lambda *args: launch(*views(args))


def described(tile: Mapping[str, Any]) -> dict[str, Any]:
    """A tile as ``cubin.encode`` takes it."""
    kind, size = _ELEMENTS[tile["of"]]
    return {"elem_type": kind, "elem_size": size, "block_size": list(tile["box"]), "swizzle": _SWIZZLES[tile["swizzle"]]}


def _descriptor(view: Any, tile: Mapping[str, Any]) -> list[Any]:
    return encode(view, tile)[:1]


def command(gpu: Gpu, out: Path) -> list[str | Path]:
    """What makes ``BINARY`` of ``TEXT`` in a folder."""
    host = os.environ.get("CXX") or os.environ.get("CC")  # preprocesses; by default nvcc takes gcc
    return [
        nvcc.find(),
        *(("-ccbin", host) if host else ()),
        "-cubin",
        "-std=c++17",
        "-O3",
        f"-gencode=arch={gpu.arch.replace('sm', 'compute')},code={gpu.arch}",
        "-o",
        out / BINARY,
        out / TEXT,
    ]


def _resources(usage: tuple[int, int, int], facts: Mapping[str, int], gpu: Gpu) -> Resources:
    registers, spills, static = usage
    if static and gpu.capability >= 90:  # the assembler then counts the system's share, which is no part of a block's limit
        static -= _SMEM_OF_THE_SYSTEM
    return Resources(registers, spills, static + facts["smem"], facts["threads"])


BACKEND = CudaBackend()
