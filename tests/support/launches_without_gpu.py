"""Run in a process of its own, with a driver that writes launches down: ours arrive there as Triton's own launcher's do."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
from triton.runtime.driver import driver as triton_driver

from dsa_codegen import ops
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels import backends
from dsa_codegen.kernels.backends import cubin, launcher
from dsa_codegen.kernels.backends.base import import_module
from dsa_codegen.kernels.backends.cubin import TritonCubin
from dsa_codegen.kernels.backends.launcher import TritonKernel
from dsa_codegen.kernels.build import Built, build
from dsa_codegen.kernels.render import render
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw

GPU = resolve("H200")
STREAM, FUNCTION = 77, 1234
BYTES = {"i1": 1, "i32": 4, "i64": 8, "fp32": 4}


def parameters(signature: dict[Any, str]) -> list[int]:
    """Bytes of each parameter of a compiled kernel; of a descriptor the 8 that the driver set."""
    found = []
    for kind in signature.values():
        view = re.match(r"tensordesc<[^[]*\[([^]]*)\]", kind)
        rank = 1 + view[1].count(",") if view else 0
        found += [8, *[4] * rank, *[8] * rank] if view else [BYTES.get(kind, 8)]
    return found


def facts(built: Built, kernel: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(built.folder) / f"{kernel}.json").read_text())
    return found


def told(kernel: Any) -> tuple[Any, ...]:
    """What C is told of a kernel, of which there is nothing else to tell."""
    recipe = kernel.recipe
    described = json.loads(json.dumps([dict(each) for each in recipe.described]))
    shape = recipe.threads, recipe.smem, recipe.cluster, recipe.pdl
    return recipe.name, recipe.function, recipe.parameters.kinds, shape, described, recipe.hidden


def main(libcuda: str, *names: str) -> None:
    """Say of each operation and backend that its launches arrive, or why not."""
    driver = ctypes.CDLL(libcuda)
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    triton_driver.set_active(CudaDriver())
    for each in names:
        try:
            compare(driver, *each.split())
            print(f"{each}: as Triton sends them")
        except Exception:
            print(f"{each}: {traceback.format_exc()}")


def compare(driver: ctypes.CDLL, name: str, backend: str) -> None:
    """Launch an operation's kernels by Triton's launcher and by ours."""
    op = ops.get(name)
    spec = op.specs(presets.preset("glm-5"))[0]
    case = op.cases(spec)[0]
    config = op.default_config(spec, case.sizes, GPU, backend)
    built = build(render(op, spec, config), GPU)
    module = import_module(built.source)
    inputs = op.inputs(spec, case, Draw(1))
    launches = op.launches(spec, config, inputs, op.allocate(spec, inputs), GPU)
    assert launches
    for launch in launches:
        kernel = backends.get(backend)._restore(module, launch.kernel, Path(built.folder))
        kernel._run, kernel.module, kernel.function = CudaLauncher(kernel.src, kernel.metadata), 1, FUNCTION
        sizes = parameters(kernel.src.signature)
        ctypes.c_int.in_dll(driver, "parameters").value = len(sizes)
        (ctypes.c_int * 64).in_dll(driver, "sizes")[: len(sizes)] = sizes

        def written(run: Callable[..., None], *args: Any) -> list[int]:
            run(*args)
            return list((ctypes.c_ulonglong * 80).in_dll(driver, "written"))

        head = (*launch.grid, STREAM, FUNCTION, kernel.packed_metadata, None, None, None)
        wanted = written(kernel.run, *head, *launch.args)
        assert wanted[0] == launch.grid[0] and wanted[6:8] == [STREAM, FUNCTION] and any(wanted[8:])
        ours = TritonKernel(kernel)
        assert ours._launch is not kernel.run, "not the short way"
        launcher._KNOWN = False
        unknown = TritonKernel(kernel)  # as of a Triton that is newer than this package
        launcher._KNOWN = True
        assert unknown._launch is kernel.run
        addresses = tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in launch.args)
        ahead = TritonCubin(b"\0", cubin.types_of(built.folder)[launch.kernel], facts(built, launch.kernel))
        ahead._function.value = FUNCTION
        assert told(ours) == told(ahead)
        for way in (ours, unknown, ahead):
            for args in (launch.args, launch.args, addresses):
                assert written(way, launch.grid, args) == wanted, launch.kernel
            assert written(way.bound(launch.grid), *addresses) == wanted, launch.kernel


if __name__ == "__main__":
    main(*sys.argv[1:])
