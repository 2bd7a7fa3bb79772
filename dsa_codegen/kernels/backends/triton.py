"""Triton: a rendered module's ``@triton.jit`` kernels, compiled once from the signatures that the module states.

A module states ``SIGNATURES = {kernel: {argument: type}}`` and ``OPTIONS = {kernel: {num_warps, num_stages, …}}``.
Types are Triton's ("*fp8e4nv", "i32"); pointers are taken as 16-byte aligned and ":16" marks an integer that 16 divides.
Nothing is specialised at run time, so no argument value can trigger a compilation while a model serves.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ...errors import BuildError, ToolBroken, ToolMissing
from ...gpu import Gpu
from . import cubin
from .base import C_COMPILER, Backend, Launchable, Resources, cubin_usage, import_module
from .launcher import TritonKernel

_COMMON = {"enable_fp_fusion": True}  # the default up to 3.9, which announces another one for 3.10
_LOCK = threading.Lock()  # Triton's cache folder is a setting of the whole process


class TritonBackend(Backend):
    """See the module's first lines."""

    name = "triton"
    source_type: type[ASTSource] = ASTSource

    def toolchain(self) -> dict[str, str]:
        return {"triton": triton.__version__}

    def compile(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Resources]:
        module = import_module(source)
        with _LOCK, tempfile.TemporaryDirectory(prefix="dsa-triton-") as scratch, triton.knobs.cache.scope():
            triton.knobs.cache.dir = scratch
            cubin.write_types(module.SIGNATURES, out)
            return {kernel: self._compile_into(module, kernel, gpu, out) for kernel in module.SIGNATURES}

    def load(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Launchable]:
        module = import_module(source)
        try:
            return {kernel: TritonKernel(self._restore(module, kernel, out)) for kernel in module.SIGNATURES}
        except subprocess.CalledProcessError as error:
            raise ToolBroken("the C compiler", str(error), f"{C_COMPILER}, and Python's headers (python3-dev)") from error
        except RuntimeError as error:
            if "C compiler" not in str(error):
                raise
            raise ToolMissing("a C compiler", C_COMPILER) from error

    def load_ahead(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Launchable]:
        return cubin.load(out) if cubin.serves(out) else self.load(source, gpu, out)

    def _source(self, module: Any, kernel: str) -> ASTSource:
        types = module.SIGNATURES[kernel]
        signature = {name: kind.removesuffix(":16") for name, kind in types.items()}
        aligned = [index for index, kind in enumerate(types.values()) if kind.startswith("*") or kind.endswith(":16")]
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        return self.source_type(getattr(module, kernel), signature, {}, attributes)

    def _compile_into(self, module: Any, kernel: str, gpu: Gpu, out: Path) -> Resources:
        target = GPUTarget("cuda", gpu.capability, 32)
        try:
            compiled = triton.compile(self._source(module, kernel), target=target, options=_COMMON | module.OPTIONS[kernel])
        except Exception as error:  # MLIR raises RuntimeError, ptxas and the front end classes of their own
            raise BuildError(f"{kernel} for {gpu.arch}", _first_line(error)) from error
        for name, path in compiled.metadata_group.items():
            if name.endswith((".cubin", ".json")):
                shutil.copyfile(path, out / f"{kernel}{Path(name).suffix}")
        registers, spills, static = cubin_usage(out / f"{kernel}.cubin")[compiled.metadata.name]
        smem = max(static, compiled.metadata.shared)
        return Resources(registers, spills, smem, compiled.metadata.num_warps * 32)

    def _restore(self, module: Any, kernel: str, out: Path) -> CompiledKernel:
        files = {f"{kernel}.{extension}": str(out / f"{kernel}.{extension}") for extension in ("json", "cubin")}
        metadata = json.loads((out / f"{kernel}.json").read_text())
        return CompiledKernel(self._source(module, kernel), files, metadata["hash"])


def interpreted(source: Path) -> Mapping[str, Launchable]:
    """The module's kernels run by Triton's interpreter on CPU tensors; needs ``TRITON_INTERPRET=1`` from the start."""
    assert triton.knobs.runtime.interpret, "start the process with TRITON_INTERPRET=1"
    from .interpreter import repair

    repair()
    module = import_module(source)

    def launchable(kernel: str) -> Launchable:
        function = getattr(module, kernel)
        return lambda grid, args: function[grid](*args)

    return {kernel: launchable(kernel) for kernel in module.SIGNATURES}


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


BACKEND = TritonBackend()
