"""CUDA C++: what nvcc makes of a module, how arguments are packed, and what reaches the driver."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import shutil
import struct
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from dsa_codegen.command import standalone
from dsa_codegen.errors import BuildError, ToolMissing
from dsa_codegen.kernels import backends
from dsa_codegen.kernels.backends import cubin, cuda, driver, nvcc
from dsa_codegen.kernels.tma import Tiled

from support import H200

SUPPORT = Path(__file__).parents[1] / "support"
ARGS = ("ptr", "i32", "i64", "f32", "ptr")
MODULE = '''
SOURCE = r"""
// Threads of a cluster read each other's shared memory: sm_90 and newer only.
extern "C" __global__ void sums(const float* values, int count, long long first, float scale, float* out) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[32];
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  dynamic[threadIdx.x] = int(threadIdx.x) < count ? values[first + threadIdx.x] * scale : 0.0f;
  fixed[threadIdx.x % 32] = rank;
  __syncthreads();
  out[threadIdx.x] = dynamic[127 - threadIdx.x] + fixed[threadIdx.x % 32];
}
"""
KERNELS = {"sums": {"args": ("ptr", "i32", "i64", "f32", "ptr"), "threads": 128, "smem": 512, "cluster": 2, "pdl": False}}
'''


@pytest.fixture
def source(tmp_path) -> Path:
    """The module in a folder of its own; imported once a path, so each test has another name."""
    path = tmp_path / f"cuda_{abs(hash(str(tmp_path)))}.py"
    path.write_text(MODULE)
    return path


def test_compiles_and_reports_its_resources(source, tmp_path):
    (usage,) = backends.get("cuda").compile(source, H200, tmp_path).values()
    assert 8 <= usage.registers <= 64
    assert (usage.spills, usage.smem, usage.threads) == (0, 512 + 32 * 4, 128)
    assert (tmp_path / "kernels.cubin").stat().st_size > 1000


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("int count", "integer count", "integer"), ("%%cluster_ctarank", "%%ctaid", "mismatch")],
    ids=["the compiler", "the assembler"],
)
def test_what_does_not_compile_is_named(source, tmp_path, old, new, words):
    source.write_text(MODULE.replace(old, new))
    with pytest.raises(BuildError, match=f"for sm_90a did not compile.*error.*{words}"):
        cuda.BACKEND.compile(source, H200, tmp_path)


def test_the_compiler_is_the_one_that_tilelang_calls():
    from tilelang.contrib.nvcc import get_nvcc_compiler

    assert nvcc.version(nvcc.find()) == nvcc.version(get_nvcc_compiler()) == cuda.BACKEND.toolchain()["nvcc"]


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_comes_first(monkeypatch, tmp_path, variable):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(ToolMissing, match=f"nvcc at {tmp_path}/bin/nvcc was not found.*CUDA_HOME"):
        cuda.BACKEND.toolchain()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 77.1, V77.1.2'\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    assert cuda.BACKEND.toolchain() == {"nvcc": "77.1"}


def test_without_a_compiler_the_remedy_is_named(monkeypatch, tmp_path):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    monkeypatch.setattr(nvcc.importlib.metadata, "files", nothing)
    monkeypatch.setattr(nvcc, "_TOOLKIT", tmp_path)
    with pytest.raises(ToolMissing, match=r"nvcc was not found.*pip install .*tilelang"):
        cuda.BACKEND.toolchain()


def test_without_a_driver_loading_says_so(monkeypatch, source, tmp_path):
    monkeypatch.setattr(driver, "_LIBRARY", "libcuda-of-nobody.so.1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver.library.cache_clear()
    (tmp_path / "kernels.cubin").write_bytes(b"machine code")
    with pytest.raises(ToolMissing, match=r"libcuda-of-nobody\.so\.1 was not found; NVIDIA's driver"):
        cuda.BACKEND.load(source, H200, tmp_path)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A driver that writes launches down; its name is its own, so that no other library of this process finds it."""
    path = tmp_path_factory.mktemp("driver") / "libcuda_that_writes.so"
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    subprocess.run(["gcc", "-shared", "-fPIC", "-I", headers, SUPPORT / "fake_libcuda.c", "-o", path], check=True)
    return path


class Written:
    """What the driver wrote down."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def number(self, name: str) -> int:
        return ctypes.c_uint.in_dll(self._library, name).value

    def allowed(self) -> dict[int, int]:
        values = (ctypes.c_uint * 16).in_dll(self._library, "allowed")
        found = {attribute: value for attribute, value in enumerate(values) if value}
        ctypes.memset(values, 0, ctypes.sizeof(values))
        return found

    def answer(self, *codes: int) -> None:
        (ctypes.c_int * 8).in_dll(self._library, "answers")[: len(codes)] = codes[::-1]
        ctypes.c_int.in_dll(self._library, "waiting").value = len(codes)

    def launch(self) -> tuple[tuple[int, ...], bytes]:
        """(grid, threads, smem, attributes, stream, function), and the arguments' bytes."""
        row = (ctypes.c_ulonglong * 80).in_dll(self._library, "written")
        return tuple(row[:8]), bytes(row)[64 : 64 + 8 * len(ARGS)]

    def expect(self, sizes: Sequence[int]) -> None:
        """Bytes of each parameter, as the driver knows them of a kernel."""
        ctypes.c_int.in_dll(self._library, "parameters").value = len(sizes)
        (ctypes.c_int * 64).in_dll(self._library, "sizes")[: len(sizes)] = sizes


@pytest.fixture
def written(monkeypatch, library):
    monkeypatch.setattr(driver, "_LIBRARY", str(library))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    driver.library.cache_clear()
    yield Written(library)
    driver.library.cache_clear()


pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="nvcc and the driver that writes launches down need it")
VALUES = torch.arange(4, dtype=torch.float32)
OUT = torch.tensor([7])  # one integer, which would pass for a number


def kernel_of(written, **facts) -> driver.CudaKernel:
    given = {"args": ARGS, "threads": 128, "smem": 512, **facts}
    written.expect([8, 4, 8, 4, 8])
    return driver.CudaKernel(driver.load_module(b"\5"), "sums", **given)


@pytest.mark.parametrize("by_address", [False, True])
def test_arguments_reach_the_driver_as_a_kernel_reads_them(written, by_address):
    kernel = kernel_of(written)
    tensors = [tensor.data_ptr() if by_address else tensor for tensor in (VALUES, OUT)]
    kernel((5, 6, 7), (tensors[0], -2, 1 << 40, 0.5, tensors[1]))
    head, arguments = written.launch()
    assert head == (5, 6, 7, 128, 512, 0, 73, 5 + ord("s"))
    expected = struct.pack("<Qi4xqf4xQ", VALUES.data_ptr(), -2, 1 << 40, 0.5, OUT.data_ptr())
    assert arguments == expected


def test_a_bound_launch_is_the_same_with_the_grid_it_was_bound_to(written):
    """From several threads, after a failure, and beside another grid of the same kernel."""
    kernel = kernel_of(written)
    launch, other = kernel.bound((5, 6, 7)), kernel.bound((1, 2, 3))
    for each, grid in ((launch, (5, 6, 7)), (other, (1, 2, 3)), (launch, (5, 6, 7))):
        values = VALUES.data_ptr(), -2, 1 << 40, 0.5, OUT.data_ptr()
        kernel((9, 9, 9), values)
        expected = (*grid, *written.launch()[0][3:]), written.launch()[1]
        each(*values)
        assert written.launch() == expected
        kernel((9, 9, 9), values)
        thread = threading.Thread(target=each, args=values)
        thread.start()
        thread.join()
        assert written.launch() == expected
    written.answer(701)
    with pytest.raises(RuntimeError, match=r"to launch sums with a grid of \(1, 2, 3\)"):
        other(VALUES.data_ptr(), 1, 1, 1.0, OUT.data_ptr())
    written.answer(201, 0)
    other(VALUES.data_ptr(), 1, 1, 1.0, OUT.data_ptr())


def test_a_loaded_module_launches_what_it_states(written, source, tmp_path):
    (tmp_path / "kernels.cubin").write_bytes(b"\x09")
    kernel = cuda.BACKEND.load(source, H200, tmp_path)["sums"]
    assert kernel.takes_addresses
    kernel((2, 1, 1), (VALUES, 4, 0, 1.0, OUT))
    assert written.launch()[0] == (2, 1, 1, 128, 512, 1, 73, 9 + ord("s"))
    assert (written.number("cluster"), written.number("overlaps")) == (2, 0)


@pytest.mark.parametrize(
    ("facts", "count", "cluster", "overlaps", "allowed"),
    [
        ({}, 0, 0, 0, {}),
        ({"pdl": True}, 1, 0, 1, {}),
        ({"cluster": 8, "smem": 48 * 1024, "pdl": True}, 2, 8, 1, {}),
        ({"cluster": 16, "smem": 200_000}, 1, 16, 0, {8: 200_000, 14: 1}),
    ],
    ids=json.dumps,
)
def test_clusters_overlap_and_shared_memory_are_asked_for(written, facts, count, cluster, overlaps, allowed):
    kernel_of(written, **facts)((1, 1, 1), (VALUES, 1, 1, 1.0, OUT))
    assert written.launch()[0][5] == count
    assert (written.number("cluster"), written.number("overlaps"), written.allowed()) == (cluster, overlaps, allowed)


def test_an_error_of_the_driver_is_raised(written):
    kernel = kernel_of(written)
    written.answer(701)
    with pytest.raises(RuntimeError, match=r"to launch sums with a grid of \(1, 1, 1\): as the test wished \(701\)"):
        kernel((1, 1, 1), (VALUES, 1, 1, 1.0, OUT))
    kernel((1, 1, 1), (VALUES, 1, 1, 1.0, OUT))


def test_a_thread_without_a_context_enters_the_device(written):
    kernel = kernel_of(written)
    written.answer(201, 0)
    kernel((1, 1, 1), (VALUES, 1, 1, 1.0, OUT))
    assert written.number("entered") == 43


def test_threads_do_not_share_what_they_hand_over(written):
    kernel = kernel_of(written)
    frames = []

    def launch():
        kernel((1, 1, 1), (VALUES, 1, 1, 1.0, OUT))
        frames.append(kernel._frames.frame)

    for _ in range(2):
        launch()
    other = threading.Thread(target=launch)
    other.start()
    other.join()
    assert frames[0] is frames[1]
    assert frames[2] is not frames[0]
    assert ctypes.addressof(frames[2].buffer) != ctypes.addressof(frames[0].buffer)


def alone_with(library, monkeypatch):
    """A generated module finds the driver that writes down, and a Hopper GPU."""
    cdll = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: cdll(str(library) if name == "libcuda.so.1" else name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: zeros(*shape))


def test_a_generated_module_launches_by_itself(written, library, monkeypatch):
    """As the launcher beside it does, which has no package to lean on."""
    written.expect([8, 8, 4, 4])
    monkeypatch.setattr(standalone, "_cubin", lambda source, arch: b"\x05" if arch == "sm_90a" else b"")
    alone_with(library, monkeypatch)
    facts = {"args": ("ptr", "ptr", "i32", "f32"), "threads": 384, "smem": 200000, "cluster": 16, "pdl": True}
    module = SimpleNamespace(SOURCE="", KERNELS={"attention": facts})
    given = torch.ones(3)
    standalone._cuda(module, "attention")((4, 2, 1), [given, 0, -5, 0.5])
    head, arguments = written.launch()
    assert head[:7] == (4, 2, 1, 384, 200000, 2, 77)
    assert struct.unpack_from("QQi4xf", arguments) == (given.data_ptr(), 0, -5, 0.5)
    assert (written.number("cluster"), written.number("overlaps")) == (16, 1)
    assert written.allowed() == {8: 200000, 14: 1}


TILES = ({"of": "u8", "box": (2, 8), "swizzle": 64}, {"of": "f32", "box": (4, 4), "swizzle": 0})
TILED = {"args": ("map", "i32", "map", "ptr"), "threads": 128, "smem": 0, "cluster": 1, "pdl": False, "tiles": TILES}


def test_tiles_arrive_as_descriptors_alone(written):
    """In their places, each for its own tile; the driver's stand-in hashes what it is told of one."""
    matrix = torch.zeros(16, 32, dtype=torch.uint8)
    kernel = cuda.kernel_of(ctypes.c_void_p(9), "sums", TILED)
    written.expect([8, 4, 8, 8])
    one, other = Tiled(matrix), Tiled(matrix, (4, 8), (32, 1), 16)
    described = [cubin.encode(view, cuda.described(tile))[0][:8] for view, tile in zip((one, other), TILES, strict=True)]
    for launch in (kernel, kernel.bound((3, 1, 1))):
        given = (one, 7, other, OUT.data_ptr())
        launch((3, 1, 1), given) if launch is kernel else launch(*given)
        head, arguments = written.launch()
        assert head[0] == 3
        assert [arguments[:8], arguments[16:24]] == described
        assert (struct.unpack_from("i", arguments, 8), struct.unpack_from("Q", arguments, 24)) == ((7,), (OUT.data_ptr(),))
    assert len({*described, *(cubin.encode(one, cuda.described(tile))[0][:8] for tile in TILES)}) == 3
    recipe = kernel.recipe
    assert recipe is not None
    assert (recipe.described, recipe.followed, recipe.hidden) == (tuple(map(cuda.described, TILES)), False, 0)


def test_every_descriptor_needs_its_tile(written):
    with pytest.raises(ValueError, match="sums: 1 tiles of 2 descriptors"):
        cuda.kernel_of(ctypes.c_void_p(9), "sums", {**TILED, "tiles": TILES[:1]})


def test_a_generated_module_makes_its_own_descriptors(written, library, monkeypatch):
    written.expect([8, 4, 8, 8])
    monkeypatch.setattr(standalone, "_cubin", lambda source, arch: b"\x05")
    alone_with(library, monkeypatch)
    matrix = torch.arange(512, dtype=torch.uint8).view(16, 32)
    views = Tiled(matrix), Tiled(matrix, (4, 8), (32, 1), 16)
    cuda.kernel_of(ctypes.c_void_p(9), "sums", TILED)((1, 1, 1), (views[0], 7, views[1], OUT.data_ptr()))
    _, wanted = written.launch()
    alone = standalone._cuda(SimpleNamespace(SOURCE="", KERNELS={"sums": TILED}), "sums")
    given = [standalone.Tiles(matrix, view.shape, view.strides, offset) for view, offset in zip(views, (0, 16), strict=True)]
    alone((1, 1, 1), [given[0], 7, given[1], OUT])
    assert written.launch()[1] == wanted
