"""Launch the kernels of this folder by themselves: with Triton, TileLang or nvcc and torch, without the package that made them.

    python launch.py              what is here
    python launch.py MODULE       a small call of the module, with random arguments; on the CPU with TRITON_INTERPRET=1

``index.json`` says what each module computes and how a call launches it: the kernels in order, their grids, their arguments.
``kernels`` gives a module's kernels to launch with arguments of your own. ``interpreter.py`` mends what Triton's interpreter
gets wrong of bf16 and FP8.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
Kernel = Callable[[Sequence[int], Sequence[Any]], None]


class Tiles:
    """A matrix of which TMA loads tiles, as Triton's launcher reads it; shape and strides in the kernel's elements."""

    padding = "zero"

    def __init__(self, tensor: torch.Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> None:
        self.tensor, self.shape, self.strides, self.offset = tensor, shape, strides, offset
        self.base = self

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self.tensor.data_ptr() + self.offset


def index() -> dict[str, Any]:
    """What ``index.json`` says, by module."""
    entries = json.loads((HERE / "index.json").read_text())
    return {entry["module"]: entry for entry in entries}


def load(name: str) -> Any:
    """The module of that name in this folder."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None, "a file of this folder can be imported"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kernels(name: str) -> dict[str, Kernel]:
    """The kernels of a module by name, each to be called with its grid and its arguments in order."""
    module = load(name)
    if hasattr(module, "SOURCE"):
        return {kernel: _cuda(module, kernel) for kernel in module.KERNELS}
    if hasattr(module, "KERNELS"):
        return {kernel: _tilelang(module, kernel) for kernel in module.KERNELS}
    if os.environ.get("TRITON_INTERPRET") == "1":
        load("interpreter").repair()
        return {kernel: _interpreted(getattr(module, kernel)) for kernel in module.SIGNATURES}
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return {kernel: _compiled(compile_kernel(module, kernel, target)) for kernel in module.SIGNATURES}


def compile_kernel(module: Any, kernel: str, target: Any) -> Any:
    """A Triton or Gluon kernel, compiled from the signature that its module states; ``target`` is a ``GPUTarget``."""
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    types = module.SIGNATURES[kernel]
    signature = {name: kind.removesuffix(":16") for name, kind in types.items()}
    aligned = [place for place, kind in enumerate(types.values()) if kind.startswith("*") or kind.endswith(":16")]
    kind = GluonASTSource if hasattr(module, "gluon") else ASTSource
    source = kind(getattr(module, kernel), signature, {}, {(place,): [["tt.divisibility", 16]] for place in aligned})
    return triton.compile(source, target=target, options=module.OPTIONS[kernel])


_C_TYPES = {
    "ptr": ctypes.c_void_p,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}
_MAX_SHARED_MEMORY, _NON_PORTABLE_CLUSTER = 8, 14  # CU_FUNC_ATTRIBUTE_ of cuda.h
_CLUSTER, _OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),  # of the grid, of a block, of its shared memory
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def _done(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA's driver says {code}")


def _cubin(source: str, arch: str) -> bytes:
    """The machine code of CUDA C++, by the nvcc of CUDA_HOME or of the PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        text.write_text(source)
        code = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
        subprocess.run([nvcc, "-cubin", "-std=c++17", "-O3", code, "-o", binary, text], check=True)
        return binary.read_bytes()


def _cuda(module: Any, kernel: str) -> Kernel:
    facts, library = module.KERNELS[kernel], ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device="cuda")  # makes the context
    major, minor = torch.cuda.get_device_capability()
    loaded, function = ctypes.c_void_p(), ctypes.c_void_p()
    _done(
        library.cuModuleLoadData(ctypes.byref(loaded), _cubin(module.SOURCE, f"sm_{major}{minor}{'a' if major >= 9 else ''}"))
    )
    _done(library.cuModuleGetFunction(ctypes.byref(function), loaded, kernel.encode()))
    _done(library.cuFuncSetAttribute(function, ctypes.c_int(_MAX_SHARED_MEMORY), ctypes.c_int(facts["smem"])))
    if facts["cluster"] > 8:
        _done(library.cuFuncSetAttribute(function, ctypes.c_int(_NON_PORTABLE_CLUSTER), ctypes.c_int(1)))
    attributes = [_Attribute(_CLUSTER, 0, (ctypes.c_uint * 16)(facts["cluster"], 1, 1))] if facts["cluster"] > 1 else []
    attributes += [_Attribute(_OVERLAP, 0, (ctypes.c_uint * 16)(1))] if facts["pdl"] else []
    stated = (_Attribute * len(attributes))(*attributes)

    def launch(grid: Sequence[int], args: Sequence[Any]) -> None:
        tiles = iter(facts.get("tiles", ()))
        given = (_descriptor(library, value, next(tiles)) if isinstance(value, Tiles) else value for value in args)
        given = (value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given)
        values = [_C_TYPES[kind](value) if kind != "map" else value for kind, value in zip(facts["args"], given, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_uint * 7)(*grid, facts["threads"], 1, 1, facts["smem"])
        config = _Launch(sizes, torch.cuda.current_stream().cuda_stream, stated, len(attributes))
        _done(library.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))

    return launch


_ELEMENTS = {"u8": (0, 1), "bf16": (9, 2), "f32": (7, 4)}  # CUtensorMapDataType, bytes
_SWIZZLES = (0, 32, 64, 128)  # bytes of a row, in the order of CUtensorMapSwizzle
_L2_PROMOTION_128B = 2


def _descriptor(library: Any, view: Tiles, tile: Mapping[str, Any]) -> Any:
    """128 bytes by which TMA finds a tile of the view."""
    (kind, size), rank = _ELEMENTS[tile["of"]], len(view.shape)
    memory = ctypes.create_string_buffer(128 + 64)
    start = (ctypes.addressof(memory) + 63) // 64 * 64  # the driver refuses another alignment
    rows = [stride * size for stride in view.strides[-2::-1]]
    _done(
        library.cuTensorMapEncodeTiled(
            ctypes.c_void_p(start),
            kind,
            rank,
            ctypes.c_void_p(view.data_ptr()),
            (ctypes.c_uint64 * rank)(*view.shape[::-1]),
            (ctypes.c_uint64 * rank)(*rows),
            (ctypes.c_uint32 * rank)(*tile["box"][::-1]),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            _SWIZZLES.index(tile["swizzle"]),
            _L2_PROMOTION_128B,
            0,
        )
    )
    return (ctypes.c_ubyte * 128).from_buffer_copy(ctypes.string_at(start, 128))


def _compiled(kernel: Any) -> Kernel:
    return lambda grid, args: kernel[tuple(grid)](*args)


def _interpreted(function: Any) -> Kernel:
    return lambda grid, args: function[tuple(grid)](*args)


def _tilelang(module: Any, kernel: str) -> Kernel:
    import tilelang

    major, minor = torch.cuda.get_device_capability()
    target = {"kind": "cuda", "arch": f"sm_{major}{minor}{'a' if major >= 9 else ''}"}
    compiled = tilelang.compile(
        module.KERNELS[kernel](), target=target, execution_backend="tvm_ffi", pass_configs=module.PASS_CONFIGS
    )
    return lambda grid, args: compiled(*args)  # its grid lies in the kernel


def arguments(tensors: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, torch.Tensor]:
    """Random tensors of the shapes, strides, types and ranges that the index states."""
    torch.manual_seed(0)
    return {name: _drawn(stated, device) for name, stated in tensors.items()}


def _drawn(stated: Mapping[str, Any], device: str) -> torch.Tensor:
    dtype = getattr(torch, stated["dtype"])
    tensor = _view(torch.zeros(stated["bytes"], dtype=torch.uint8, device=device), dtype, stated)
    if "range" in stated:  # of whole numbers: windows, tokens, slots, bytes of a cache
        low, high = stated["range"]
        tensor.copy_(torch.randint(low, high + 1, tensor.shape, device=device))
    else:
        tensor.copy_(torch.randn(tensor.shape, device=device).to(dtype))
    return tensor


def _view(base: torch.Tensor, dtype: torch.dtype, stated: Mapping[str, Any]) -> torch.Tensor:
    """A tensor over the memory of another; its offset is in elements of ``dtype``."""
    made = torch.empty(0, dtype=dtype, device=base.device)
    return made.set_(base.untyped_storage(), stated.get("offset", 0), stated["shape"], stated["stride"])


def _argument(stated: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(stated, dict):
        return stated
    if "tiles" in stated:
        return Tiles(tensors[stated["tiles"]], stated["shape"], stated["stride"], stated["offset"])
    return _view(tensors[stated["of"]], getattr(torch, stated["dtype"]), stated)


def run(name: str, device: str) -> dict[str, torch.Tensor]:
    """Launch the small call of a module; returns its tensors by name, inputs, outputs and workspaces."""
    call = index()[name]["call"]
    tensors = arguments(call["tensors"], device)
    made = kernels(name)
    for launch in call["launches"]:
        made[launch["kernel"]](launch["grid"], [_argument(stated, tensors) for stated in launch["args"]])
    return tensors


def main() -> None:
    """See the module's first lines."""
    entries = index()
    if len(sys.argv) != 2 or sys.argv[1] not in entries:
        for name, entry in entries.items():
            print(f"{name}\n  {entry['summary']}\n  for {'; '.join(call['sizes'] for call in entry['serves'])}")
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name, tensor in run(sys.argv[1], "cpu" if interpreted else "cuda").items():
        print(f"{name}: {tensor.dtype} {list(tensor.shape)}, mean {tensor.double().nanmean():.6g}")


if __name__ == "__main__":
    main()
