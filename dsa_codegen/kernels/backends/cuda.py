"""CUDA C++: a rendered module's source text, compiled by nvcc and launched through the driver; no compiler is needed to load.

A module states ``SOURCE``, the text, and ``KERNELS = {kernel: {args, threads, smem, cluster, pdl}}`` for the text's
``extern "C" __global__`` functions: ``args`` are the kinds of their parameters in order ("ptr", "i32", "u32", "i64", "u64",
"f32", "f64"), ``threads`` those of a block, ``smem`` its dynamic bytes, ``cluster`` the blocks of a cluster (along x), and
``pdl`` says whether a launch may overlap the kernel before it. The language is for what ends at the edge of a block in the
others: clusters, the shared memory of a neighbour, registers that warps hand to each other.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ...errors import BuildError
from ...gpu import Gpu
from . import nvcc
from .base import Backend, Launchable, Resources, cubin_usage, import_module
from .driver import CudaKernel, load_module

TEXT, BINARY, _REPORT = "kernels.cu", "kernels.cubin", "kernels.log"
_SMEM_OF_THE_SYSTEM = 1024


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
        return {kernel: CudaKernel(loaded, kernel, **facts) for kernel, facts in kernels.items()}


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
