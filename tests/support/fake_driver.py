"""CUDA's driver in Python: launches are written down, whether Python or C made them; and kernels that are launched by it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_codegen.kernels.backends import cubin, driver
from dsa_codegen.kernels.backends.driver import CudaKernel, Recipe
from dsa_codegen.kernels.tma import Tiled

from fake_gpu import FakeGpu

STREAM = 77
_BYTES = {"ptr": 8, "i32": 4, "i64": 8, "f32": 4, "map": 128}
_TILE = {"elem_size": 1, "elem_type": 0, "block_size": [8, 8], "swizzle": 3}


@dataclass(frozen=True)
class Launched:
    """What the driver was told."""

    function: int
    shape: tuple[int, ...]
    """Grid, block, bytes of shared memory, stream."""
    attributes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    values: tuple[bytes, ...]

    def addresses(self) -> list[int]:
        """Those that were passed, null aside."""
        numbers = [int.from_bytes(each, "little") for kind, each in zip(self.kinds, self.values, strict=True) if kind == "ptr"]
        return [number for number in numbers if number]

    def named(self, names: Mapping[int, str], room: int) -> tuple[Any, ...]:
        """With names for addresses; those that have none are places in a room."""

        def name(kind: str, value: bytes) -> Any:
            address = int.from_bytes(value, "little") if kind == "ptr" else 0
            return names.get(address, address - room) if address else value

        told = [name(kind, value) for kind, value in zip(self.kinds, self.values, strict=True)]
        return self.function, self.shape, self.attributes, told


class FakeDriver:
    """Stands in for the library; ``answers`` are what the next launches return, the first one first.

    ``meanwhile`` happens behind every launch, as another thread's work might; ``capturing`` is every stream's status, and
    ``refuses`` what is answered to the question.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[Launched] = []
        self.answers: list[int] = []
        self.kinds: dict[int, tuple[str, ...]] = {}
        self.entered = 0
        prototype = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_void_p)
        self.cuLaunchKernelEx = prototype(self._launch)
        self.capturing, self.refuses = 0, 0
        self.cuStreamIsCapturing = ctypes.CFUNCTYPE(c_int, c_void_p, ctypes.POINTER(c_int))(self._is_capturing)
        self.meanwhile: Callable[[], object] = lambda: None
        self.cuModuleGetFunction = lambda function, module, name: setattr(function._obj, "value", len(self.kinds) + 1)
        for name in ("cuModuleLoadData", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuCtxGetCurrent", "cuGetErrorString"):
            setattr(self, name, lambda *args: 0)
        for module in (driver, cubin):
            monkeypatch.setattr(module, "library", lambda: self)
        monkeypatch.setattr(driver, "enter_context", self._enter)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device, raising=False)

    def cuTensorMapEncodeTiled(self, start: c_void_p, kind: c_int, rank: Any, address: c_void_p, *rest: Any) -> int:
        """The address and the shape, which tell one descriptor from another."""
        shape = bytes(rest[0])
        ctypes.memmove(start.value, (address.value or 0).to_bytes(8, "little") + shape, 8 + len(shape))
        return 0

    def _is_capturing(self, stream: int, status: Any) -> int:
        status[0] = self.capturing
        return self.refuses

    def _enter(self, device: int) -> None:
        self.entered += 1

    def _launch(self, config: int, function: int, parameters: int, extra: int) -> int:
        told, kinds = driver._Config.from_address(config), self.kinds[function]
        places = (c_void_p * len(kinds)).from_address(parameters)
        values = [ctypes.string_at(place, _BYTES[kind]) for kind, place in zip(kinds, places, strict=True)]
        shape = told.grid_x, told.grid_y, told.grid_z, told.block_x, told.block_y, told.block_z, told.smem, told.stream
        attributes = [told.attributes[number] for number in range(told.count)]
        known = tuple([(each.id, *each.value) for each in attributes])
        self.launched.append(Launched(function, shape, known, kinds, tuple(values)))
        self.meanwhile()
        return self.answers.pop(0) if self.answers else 0


class DrivenKernels(dict):
    """Every kernel there might be; they learn at their first launch what they are launched with."""

    def __init__(self, fake: FakeDriver) -> None:
        super().__init__()
        self._fake = fake

    def __missing__(self, name: str) -> DrivenKernel:
        return self.setdefault(name, DrivenKernel(name, self._fake))

    def __bool__(self) -> bool:
        return True


class DrivenKernel:
    """One of them: a kernel in CUDA C++, or, where it takes tiles but none of four dimensions, as Triton's compiled ahead."""

    takes_addresses = True

    def __init__(self, name: str, fake: FakeDriver) -> None:
        self._name, self._fake = name, fake
        self._kernel: CudaKernel | None = None
        self._tiles = 0
        self._followed = False

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        kernel = self._kernel or self._loaded(args)
        kernel(grid, self._expanded(args))

    def bound(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert self._kernel is not None
        launch = self._kernel.bound(grid)
        return lambda *args: launch(*self._expanded(args))

    @property
    def recipe(self) -> Recipe | None:
        assert self._kernel is not None
        found = self._kernel.recipe
        hidden = 2 if self._followed else 0
        return found and replace(found, described=[_TILE] * self._tiles, followed=self._followed, hidden=hidden)

    def _loaded(self, args: Sequence[Any]) -> CudaKernel:
        kinds: list[str] = []
        ranks = [len(value.shape) for value in args if isinstance(value, Tiled)]
        self._tiles, self._followed = len(ranks), 0 < max(ranks, default=0) < 4
        for value in args:
            if isinstance(value, Tiled):
                kinds += ["map", *(["i32"] * len(value.shape) + ["i64"] * len(value.strides)) * self._followed]
            else:
                kinds.append("ptr" if isinstance(value, Tensor) else "f32" if isinstance(value, float) else "i64")
        kinds += ["ptr", "ptr"] if self._followed else []
        clusters = 2 if len(self._name) % 2 else 1
        found = CudaKernel(c_void_p(5), self._name, kinds, 32 * len(kinds), 1024, clusters, pdl=len(kinds) % 2 == 0)
        self._fake.kinds[found._function.value or 0] = tuple(kinds)
        self._kernel = found
        return found

    def _expanded(self, args: Sequence[Any]) -> list[Any]:
        row: list[Any] = []
        for value in args:
            row += cubin.encode(value, _TILE)[: None if self._followed else 1] if isinstance(value, Tiled) else [value]
        return [*row, 0, 0] if self._followed else row


def driven_gpu(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[FakeGpu, FakeDriver]:
    """A GPU that is not there, whose driver writes down what the kernels of every variant are launched with."""
    fake = FakeDriver(monkeypatch)
    gpu = FakeGpu(monkeypatch, kernels=DrivenKernels(fake), **options)
    gpu.load = lambda: DrivenKernels(fake)  # type: ignore[method-assign]
    return gpu, fake
