"""TileLang: a rendered module's prim_funcs, lowered to CUDA C++ and compiled by nvcc.

A module states ``KERNELS = {kernel: builder}`` (a builder takes nothing and returns a ``T.prim_func``), ``THREADS`` per
block, and ``PASS_CONFIGS``. A launch passes the arguments in the order of the prim_func; its grid lies in the prim_func.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tilelang
from tilelang.contrib.nvcc import get_nvcc_compiler
from tilelang.jit.adapter.kernel_cache import TVMFFIKernelCache

from ...errors import BuildError, ToolMissing
from ...gpu import Gpu
from . import nvcc
from .base import Backend, Launchable, Resources, cubin_usage, import_module

_LOCK = threading.Lock()  # TileLang's cache folder is a setting of the whole process


class TileLangBackend(Backend):
    """See the module's first lines."""

    name = "tilelang"

    def toolchain(self) -> dict[str, str]:
        try:
            compiler = get_nvcc_compiler()  # the one that TileLang will call: CUDA_HOME's, the PATH's or pip's
        except RuntimeError as error:
            raise ToolMissing("nvcc", nvcc.REMEDY) from error
        return {"tilelang": tilelang.__version__, "nvcc": nvcc.version(nvcc.checked(compiler))}

    def compile(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Resources]:
        module = import_module(source)
        return {kernel: self._compile_one(module, kernel, gpu, out) for kernel in module.KERNELS}

    def _compile_one(self, module: Any, kernel: str, gpu: Gpu, out: Path) -> Resources:
        folder = out / kernel
        try:
            compiled = _compile(module, kernel, gpu, folder)
        except Exception as error:  # TVM, the layout passes and nvcc all raise classes of their own
            raise BuildError(f"{kernel} for {gpu.arch}", _reason(error)) from error
        (cubin,) = folder.glob("**/cuda-binaries/*/kernel.cubin")
        ((registers, spills, static),) = cubin_usage(cubin).values()
        attributes = [dict(function.attrs) for function in compiled.artifact.device_mod.functions.values()]
        dynamic = sum(int(attribute.get("dyn_shared_memory_buf", 0)) for attribute in attributes)
        return Resources(registers, spills, static + dynamic, module.THREADS[kernel])

    def load(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Launchable]:
        module = import_module(source)
        return {kernel: _launchable(_compile(module, kernel, gpu, out / kernel)) for kernel in module.KERNELS}


def _compile(module: Any, kernel: str, gpu: Gpu, folder: Path) -> Any:
    """Compile, or find what an earlier call left in ``folder``: TileLang's own cache, which may have been moved there."""
    with _LOCK, _cache_folder(folder):
        # A kernel that an earlier source had too would be found in memory, and leave nothing in this folder.
        TVMFFIKernelCache()._memory_cache.clear()
        return tilelang.compile(
            module.KERNELS[kernel](),
            target={"kind": "cuda", "arch": gpu.arch},
            execution_backend="tvm_ffi",
            pass_configs=module.PASS_CONFIGS,
        )


@contextmanager
def _cache_folder(folder: Path) -> Iterator[None]:
    before = os.environ.get("TILELANG_CACHE_DIR")
    os.environ["TILELANG_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TILELANG_CACHE_DIR"]
        else:
            os.environ["TILELANG_CACHE_DIR"] = before


def _launchable(compiled: Any) -> Launchable:
    # The adapter counts arguments, allocates outputs (there are none here) and looks the function up, at every call.
    run = compiled.adapter.get_exportable_executable()["main"]

    def launch(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        run(*args)

    return launch


def _reason(error: Exception) -> str:
    return nvcc.telling_line(str(error)) or type(error).__name__


BACKEND = TileLangBackend()
