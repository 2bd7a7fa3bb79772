"""Runs a TileLang kernel's generated CUDA on CPU tensors, so that its arithmetic is verified where there is no GPU.

Kernels that were written in CUDA C++ too, the blocks of a cluster together. Only what plain SIMT kernels use is there (see
emulator.h): no tensor cores, no asynchronous copies. Every tensor lies before an unreadable page, so that an access beyond
its end ends the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import platform
import re
import shutil
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_codegen import paths
from dsa_codegen.kernels.backends import Launchable
from dsa_codegen.kernels.backends.base import import_module
from dsa_codegen.kernels.build import Built
from dsa_codegen.kernels.render import Rendered
from dsa_codegen.kernels.tma import Tiled

AVAILABLE = shutil.which("g++") is not None and platform.machine() == "x86_64"
ORDERS = ("ascending", "descending", "shuffled")

_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)[^)]*\) (\w+)\(([^)]*)\)')
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) uchar buf_dyn_shmem\[\];")
_LAUNCHER = """
static void call_{name}() {{ {name}({arguments}); }}
extern "C" int launch_{name}(long long *arguments, int width, int height, int threads, int order, uint random) {{
  emulator::arguments = arguments;
  emulator::kernel = call_{name}; {before}
  emulator::block_threads = threads;
  if (!emulator::shared) emulator::shared = (uchar *)malloc(emulator::shared_bytes);
  for (blockIdx.y = 0; blockIdx.y < height; blockIdx.y++)
    for (emulator::first_block = 0; emulator::first_block < width; emulator::first_block += {cluster}) {{
      memset(emulator::shared, 0xCD, emulator::shared_bytes);
      if (!emulator::run_block(threads * {cluster}, (emulator::Order)order, random)) return 1;
    }}
  return 0;
}}
"""


def kernels(built: Built, order: str) -> dict[str, Launchable]:
    """The kernels of a TileLang build by name; ``order`` says in which order the threads of a block take their turns."""
    module = import_module(built.source)
    return {name: _Emulated(built.folder / name, module.KERNELS[name](), ORDERS.index(order)) for name in module.KERNELS}


class _Emulated:
    def __init__(self, folder: Path, prim_func: Any, order: int) -> None:
        self._parameters = [(prim_func.buffer_map.get(parameter), parameter.name) for parameter in prim_func.params]
        self._order = order
        (source,) = folder.glob("**/device_kernel.cu")
        text = source.read_text()
        match = _KERNEL.search(text)
        assert match is not None, f"no kernel in {source}"
        threads, name, declared = match.groups()
        self._threads = int(threads)
        kinds, self._names = zip(*(part.strip().rsplit(" ", 1) for part in declared.split(",")), strict=True)
        arguments = ", ".join(f"({kind.replace('__restrict__', '')})emulator::arguments[{i}]" for i, kind in enumerate(kinds))
        body = _SHARED.sub("uchar *buf_dyn_shmem = emulator::shared;", text[text.index('extern "C" __global__') :])
        launcher = _LAUNCHER.format(name=name, arguments=arguments, cluster=1, before="")
        self._launch = _compiled(f'#include "emulator.h"\n{body}\n{launcher}')[f"launch_{name}"]

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        values: dict[str, int] = {}
        memory = []
        for (buffer, name), arg in zip(self._parameters, args, strict=True):
            if buffer is None:
                values[name] = int(arg)
                continue
            symbols = [*zip(buffer.shape, arg.shape, strict=True), *zip(buffer.strides, arg.stride(), strict=False)]
            values.update({symbol.name: size for symbol, size in symbols if hasattr(symbol, "name")})
            memory.append(_Guarded(arg))
            values[buffer.name] = memory[-1].address
        arguments = (ctypes.c_longlong * len(self._names))(*(values[name] for name in self._names))
        stuck = self._launch(arguments, grid[0], grid[1], self._threads, self._order, ctypes.c_uint(1))
        assert not stuck, "threads wait at a barrier that others never reach"
        for guarded in memory:
            guarded.copy_back()


_PRAGMA_OR_INCLUDE = re.compile(r"^#(?:pragma|include).*$", re.MULTILINE)
_ASSEMBLY = re.compile(r"\basm(?: volatile)?\(.*?\);(?: *//[^\n]*)?\n", re.DOTALL)
# The copy engine, in a function of its own; a wait for it, which is over at once.
_BRING = re.compile(r"(void bring\([^)]*\) \{\n) *asm volatile\(.*?\);\n", re.DOTALL)
_RECEIVE = re.compile(r"\basm volatile\(\"[^\"]*mbarrier\.try_wait.*?\);\n", re.DOTALL)
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s*(\w+)\(([^)]*)\)')
_SHARED_OF_CUDA = re.compile(r"extern __shared__ __align__\(\d+\) ((?:unsigned )?char) (\w+)\[\];")
_CONSUMERS = re.compile(r"    // The consumers: .*?(?=  }\n  cluster_sync\(\);)", re.DOTALL)
_RANK = re.compile(r"DEVICE u32 rank_in_cluster\(\) \{.*?\n}\n", re.DOTALL)
_CLUSTER_SYNC = re.compile(r"DEVICE void cluster_sync\(\).*\n")
# Of a cluster whose blocks write into each other's shared memory; emulator_cluster.h has these functions in their place.
_ACROSS = re.compile(
    r"__device__ __forceinline__ \w+ "
    r"(?:init_barrier|expect|receive|cluster_rank|remote|send|load_remote4?|cluster_arrive|cluster_wait)\([^)]*\) "
    r"\{(?:[^\n]*\}\n|.*?\n\}\n)",
    re.DOTALL,
)
_SOME_WARPS = re.compile(r'asm volatile\("bar\.sync 1, %0;" ::"n"\((.*?)\) : "memory"\);')
_NAMED = re.compile(r'asm volatile\("bar\.(sync|arrive) (%0|\d+), (\d+);" ::(?:"r"\((.*?)\) )?: "memory"\);')
_FUNCTION = re.compile(r"(?:template <[^>]*> )?DEVICE ")
_OF_HOPPER = re.compile(r"\basm\b|\bbarrier_passed\b")  # in a function that emulator_hopper.h has in its place
_PRODUCT8 = re.compile(r"DEVICE void (\w+)\((.*?)\) \{.*m64n(\d+)k32", re.DOTALL)
_PRODUCT = re.compile(r"DEVICE void (\w+)\((.*?)\) \{.*m64n(\d+)k16.*p, 1, 1, (\d)(?:, (\d))?;", re.DOTALL)


def cuda_kernels(rendered: Rendered, folder: Path, order: str) -> dict[str, Launchable]:
    """The kernels of a module in CUDA C++, inline assembly left out: what it waits for has happened in an emulated block."""
    source = folder / f"{rendered.module_name}.py"
    source.write_text(rendered.text)
    module = import_module(source)
    return dict(_cuda(module.SOURCE, module.KERNELS, ORDERS.index(order)))


def _cuda(text: str, kernels: dict[str, dict[str, Any]], order: int) -> Iterator[tuple[str, _EmulatedCuda]]:
    """The kernels of a text by name, all from one library."""
    header = "emulator_cuda.h"
    if "wgmma" in text:
        header, text = "emulator_hopper.h", _NAMED.sub(_met, "\n".join(_without_instructions(text)))
    elif "load_remote" in text:
        header, text = "emulator_cluster.h", _SOME_WARPS.sub(r"emulator::meet(\1);", _ACROSS.sub("", text))
    text = _RECEIVE.sub("done = 1;\n", _BRING.sub(r"\1memcpy(to, from, bytes);\n", _PRAGMA_OR_INCLUDE.sub("", text)))
    text = _ASSEMBLY.sub(";\n", text)
    declared = {match[1]: [" ".join(part.split()) for part in match[2].split(",")] for match in _SIGNATURE.finditer(text)}
    text = _SHARED_OF_CUDA.sub(r"\1 *\2 = (\1 *)emulator::shared + emulator::rank() * emulator::block_bytes;", text)
    cluster = max(facts["cluster"] for facts in kernels.values())  # of the functions, which are of the whole text
    launchers = "".join(_cuda_launcher(name, declared[name], facts["cluster"]) for name, facts in kernels.items())
    library = _compiled(f'#define EMULATED_CLUSTER {cluster}\n#include "{header}"\n{text}\n{launchers}')
    for name, facts in kernels.items():
        names = [parameter.rpartition(" ")[2] for parameter in declared[name]]
        yield name, _EmulatedCuda(library[f"launch_{name}"], names, facts["threads"], order, facts.get("tiles", ()))


def _met(barrier: re.Match[str]) -> str:
    """A barrier of some warps, at which they wait or say that they have come."""
    way, number, threads, expression = barrier.groups()
    place = expression if number == "%0" else number
    return f"emulator::meet({place}, {threads}, false);" if way == "sync" else f"emulator::come({place}, {threads});"


def _cuda_launcher(name: str, parameters: list[str], cluster: int) -> str:
    kinds = [parameter.rpartition(" ")[0] for parameter in parameters]
    ways = {"float": "bits_as<float>((uint){0})", "const __grid_constant__ TileMap": "*(const TileMap *){0}"}
    arguments = ", ".join(ways.get(kind, f"({kind}){{0}}").format(f"emulator::arguments[{i}]") for i, kind in enumerate(kinds))
    return _LAUNCHER.format(name=name, arguments=arguments, cluster=cluster, before="gridDim = {width, height, 1};")


class _EmulatedCuda:
    def __init__(
        self, launch: Callable[..., int], names: list[str], threads: int, order: int, tiles: Sequence[Mapping[str, Any]]
    ) -> None:
        self._launch, self.names, self._threads, self._order, self._tiles = launch, names, threads, order, tiles

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        tensors = {i: arg.tensor if isinstance(arg, Tiled) else arg for i, arg in enumerate(args)}
        memory = {i: _Guarded(tensor) for i, tensor in tensors.items() if isinstance(tensor, Tensor)}
        tiles = iter(self._tiles)
        maps = {i: _described(arg, memory[i].address, next(tiles)) for i, arg in enumerate(args) if isinstance(arg, Tiled)}
        values = (
            ctypes.addressof(maps[i]) if i in maps else memory[i].address if i in memory else _as_integer(arg)
            for i, arg in enumerate(args)
        )
        arguments = (ctypes.c_longlong * len(args))(*values)
        stuck = self._launch(arguments, grid[0], grid[1], self._threads, self._order, ctypes.c_uint(1))
        assert not stuck, "threads wait at a barrier that others never reach"
        for guarded in memory.values():
            guarded.copy_back()


class _Described(ctypes.Structure):
    """``emulator::Described``."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        *((name, ctypes.c_int * 5) for name in ("shape", "box")),
        ("element", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("strides", ctypes.c_longlong * 5),
        ("rest", ctypes.c_ubyte * 128),
    )


def _described(view: Tiled, address: int, tile: Mapping[str, Any]) -> _Described:
    """The descriptor of a view whose tensor begins there."""
    assert view.tensor is not None
    size = {"u8": 1, "bf16": 2, "f32": 4}[tile["of"]]
    found = _Described(address + view.data_ptr() - view.tensor.data_ptr(), len(view.shape), element=size)
    for i, (length, stride, box) in enumerate(zip(view.shape[::-1], view.strides[::-1], tile["box"][::-1], strict=True)):
        found.shape[i], found.strides[i], found.box[i] = length, stride * size, box
    found.swizzle = tile["swizzle"]
    return found


def cuda_gatherers(
    rendered: Rendered, folder: Path, name: str, keepers: str, rank: int, constants: dict[str, int]
) -> Callable[[tuple[int, int, int], dict[str, Tensor], tuple[Any, ...]], None]:
    """The gatherers of a kernel of clusters, in one of two blocks that do not know of each other.

    Args:
        keepers: the text that stands for the consumers.
        rank: of the block in its cluster.
        constants: that the text uses.

    Returns:
        what takes a grid, tensors by the names of parameters that stand for other ones, and the arguments of a launch.
    """
    source = folder / f"{rendered.module_name}.py"
    source.write_text(rendered.text)
    module = import_module(source)
    text = _CONSUMERS.sub(lambda _: keepers, module.SOURCE, count=1)
    text = _RANK.sub(f"DEVICE u32 rank_in_cluster() {{ return {rank}; }}\n", text[: text.index("// Joins the parts")])
    text = _CLUSTER_SYNC.sub("DEVICE void cluster_sync() {}\n", text)
    defined = "".join(f"constexpr int {constant} = {value};\n" for constant, value in constants.items())
    facts = {**module.KERNELS[name], "cluster": 1}
    ((_, kernel),) = _cuda(defined + text, {name: facts}, ORDERS.index("shuffled"))

    def launch(grid: tuple[int, int, int], others: dict[str, Tensor], args: tuple[Any, ...]) -> None:
        kernel(grid, tuple(others.get(parameter, arg) for parameter, arg in zip(kernel.names, args, strict=True)))

    return launch


def _as_integer(arg: int | float) -> int:
    return struct.unpack("I", struct.pack("f", arg))[0] if isinstance(arg, float) else int(arg)


def _without_instructions(text: str) -> Iterator[str]:
    """The lines of a text without the functions around Hopper's instructions, products in their emulated form."""
    lines = iter(text.split("\n"))
    for line in lines:
        function = [line]
        while _FUNCTION.match(line) and "}" not in function[0] and function[-1] != "}":
            function.append(next(lines))
        whole = "\n".join(function)
        if not _FUNCTION.match(line) or not _OF_HOPPER.search(whole):
            yield whole
        elif product := _PRODUCT.search(whole) or _PRODUCT8.search(whole):
            name, parameters, n, *transposed = product.groups()
            add = "add" if parameters.endswith("int add") else "0"
            rows = "a" if "u64 a" in parameters else "{a0, a1, a2, a3}"
            flags = ", ".join(flag for flag in (n, *transposed) if flag)
            kind = "product" if transposed else "product8"
            yield f"DEVICE void {name}({parameters}) {{ emulator::{kind}<{flags}>(d, {rows}, b, {add}); }}"


_OPTIONS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", f"-I{Path(__file__).parent}")


def _compiled(text: str) -> ctypes.CDLL:
    """The library of a text, made once a run for all tests and orders that emulate it; published whole, for two may make it."""
    headers = sorted(Path(__file__).parent.glob("emulator*.h"))
    key = hashlib.sha256("".join([text, *(header.read_text() for header in headers)]).encode()).hexdigest()[:32]
    library = paths.cache() / "emulated" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        source = library.with_name(f".{uuid.uuid4().hex}.cpp")
        source.write_text(text)
        subprocess.run(["g++", *_OPTIONS, source, "-o", source.with_suffix(".so")], check=True)
        source.rename(library.with_suffix(".cpp"))
        source.with_suffix(".so").rename(library)
    return ctypes.CDLL(str(library))


class _Guarded:
    """A copy of the memory that a tensor spans, with an unreadable page behind it (to the next 16 bytes)."""

    def __init__(self, tensor: Tensor) -> None:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((span if tensor.numel() else 0,), (1,)).view(torch.uint8)
        room = -(-flat.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
        self._flat, self._map = flat, mmap.mmap(-1, room + mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        protected = ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert protected == 0
        offset = room - -(-flat.numel() // 16) * 16
        self.address = base + offset
        self._copy = np.frombuffer(self._map, np.uint8, flat.numel(), offset)
        self._copy[:] = flat.numpy()

    def copy_back(self) -> None:
        self._flat.copy_(torch.from_numpy(self._copy))
