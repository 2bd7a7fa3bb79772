"""CUDA's driver, as far as loading and launching a kernel takes: ctypes on libcuda, no compiler and no headers.

Arguments lie in one buffer that ``struct`` packs, and the driver is told where each of them lies: a launch costs a few
microseconds of Python. It is an ordinary launch on torch's current stream, so CUDA graphs capture it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ToolMissing

_LIBRARY = "libcuda.so.1"
_REMEDY = "NVIDIA's driver brings it; where there is no GPU, kernels are compiled but never loaded"
_KINDS = {"ptr": "P", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "f32": "f", "f64": "d", "map": "128s"}
_SMEM_WITHOUT_ASKING = 48 * 1024
_PORTABLE_CLUSTER = 8
# Names of cuda.h.
INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED_SIZE, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14  # CU_FUNC_ATTRIBUTE_
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_
_PREFER_SHARED = 1  # CU_FUNC_CACHE_


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{of}_{axis}", c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("smem", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        ToolMissing: there is none.
    """
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ToolMissing(_LIBRARY, _REMEDY) from error


def addresses() -> tuple[int, int]:
    """For C: where the driver's functions are that launch a kernel, and that say whether a stream is being captured."""
    found = library().cuLaunchKernelEx, library().cuStreamIsCapturing
    launch, capturing = (ctypes.cast(function, c_void_p).value or 0 for function in found)
    return launch, capturing


def check(code: int, what: str) -> None:
    """Raise what the driver says of a failure."""
    if code:
        text = c_char_p()
        library().cuGetErrorString(c_int(code), ctypes.byref(text))
        raise RuntimeError(f"CUDA's driver refused {what}: {(text.value or b'unknown error').decode()} ({code})")


def load_module(cubin: bytes) -> c_void_p:
    """The machine code on the current device; it stays for the life of the process, as launches may be captured in graphs."""
    device = torch.cuda.current_device()
    context, loaded = c_void_p(), c_void_p()
    library().cuCtxGetCurrent(ctypes.byref(context))
    if not context.value:  # torch makes the device's context current in a thread once that needs it
        enter_context(device)
    check(library().cuModuleLoadData(ctypes.byref(loaded), cubin), "to load the machine code")
    return loaded


def enter_context(device: int) -> None:
    """Make the device's context this thread's; torch does so only once a thread needs it."""
    handle, context = c_int(), c_void_p()
    check(library().cuDeviceGet(ctypes.byref(handle), c_int(device)), "the device")
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "the device's context")
    check(library().cuCtxSetCurrent(context), "the device's context")


class Parameters:
    """How a kernel's parameters lie in one buffer.

    Args:
        kinds: of the parameters: see ``cuda``.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        letters = [_KINDS[kind] for kind in kinds]
        packed = struct.Struct("@" + "".join(letters))
        self.pack_into, self.size = packed.pack_into, packed.size
        ends = [struct.calcsize("@" + "".join(letters[: i + 1])) for i in range(len(letters))]
        self.offsets = tuple([end - struct.calcsize(letter) for end, letter in zip(ends, letters, strict=True)])


@dataclass(frozen=True)
class Recipe:
    """All that a launch hands to the driver but grid, stream and values: for who launches without the ``Launchable``."""

    kernel: object
    """What keeps the code on the GPU."""
    name: str
    function: int
    """CUfunction."""
    parameters: Parameters
    threads: int
    smem: int
    cluster: int = 1
    pdl: bool = False
    described: Sequence[Mapping[str, Any]] = ()
    """Of each argument of which TMA loads tiles, in order: what ``cubin.encode`` takes."""
    hidden: int = 0
    """Addresses behind the arguments, all zero."""
    followed: bool = True
    """Whether the shape and strides of what TMA loads tiles of follow its descriptor, as parameters of their own."""


class CudaKernel:
    """A ``Launchable``; its device is the one that is current when it is made.

    Args:
        module: where the function lies, as ``load_module`` gives it.
        name: of the function.
        args: kinds of its parameters: see ``cuda``.
        threads: per block.
        smem: dynamic bytes per block.
        cluster: blocks per cluster, along x.
        pdl: launches may overlap the kernel before, which the function waits for itself (``griddepcontrol.wait``).
    """

    takes_addresses = True
    """Tensors may come as their addresses."""

    def __init__(
        self, module: c_void_p, name: str, args: Sequence[str], threads: int, smem: int, cluster: int = 1, pdl: bool = False
    ) -> None:
        self._name, self._threads, self._smem, self._cluster, self._pdl = name, threads, smem, cluster, pdl
        self._parameters = Parameters(args)
        self._pack = self._parameters.pack_into
        self._pointers = tuple(place for place, kind in enumerate(args) if kind == "ptr")
        self._device = torch.cuda.current_device()
        self._stream = torch._C._cuda_getCurrentRawStream  # ~0.1 us
        self._launch = library().cuLaunchKernelEx
        self._frames = threading.local()
        self._function = c_void_p()
        check(library().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"the kernel {name}")
        if smem > _SMEM_WITHOUT_ASKING:
            self._allow(_MAX_DYNAMIC_SHARED_SIZE, smem)
            check(library().cuFuncSetCacheConfig(self._function, c_int(_PREFER_SHARED)), f"shared memory for {name}")
        if cluster > _PORTABLE_CLUSTER:
            self._allow(_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)

    def _allow(self, attribute: int, value: int) -> None:
        check(library().cuFuncSetAttribute(self._function, c_int(attribute), c_int(value)), f"{value} for {self._name}")

    @property
    def recipe(self) -> Recipe | None:
        """For launches without this class."""
        function = self._function.value or 0
        return Recipe(self, self._name, function, self._parameters, self._threads, self._smem, self._cluster, self._pdl)

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        values = list(args)
        for place in self._pointers:
            value = values[place]
            if value.__class__ is not int:  # of a tensor with one element struct would take the element
                values[place] = value.data_ptr()
        frame = self._frame(self._frames)
        config = frame.config
        config.grid_x, config.grid_y, config.grid_z = grid
        self._run(frame, values)

    def bound(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """What launches with this grid again and again, given the arguments one by one, tensors as their addresses."""
        frames = threading.local()
        frame_of, run = self._frame, self._run

        def launch(*values: Any) -> None:
            try:
                frame = frames.frame
            except AttributeError:
                frame = frame_of(frames)
                frame.config.grid_x, frame.config.grid_y, frame.config.grid_z = grid
            run(frame, values)

        return launch

    def _run(self, frame: _Frame, values: Sequence[Any]) -> None:
        self._pack(frame.buffer, 0, *values)
        frame.config.stream = self._stream(self._device)
        code = self._launch(frame.reference, self._function, frame.parameters, None)
        if code:
            self._failed(code, frame)

    def _failed(self, code: int, frame: _Frame) -> None:
        """Once more in the device's context, where this thread had none."""
        if code == INVALID_CONTEXT:
            enter_context(self._device)
            code = self._launch(frame.reference, self._function, frame.parameters, None)
        config = frame.config
        check(code, f"to launch {self._name} with a grid of {(config.grid_x, config.grid_y, config.grid_z)}")

    def _frame(self, frames: threading.local) -> _Frame:
        """This thread's."""
        try:
            found: _Frame = frames.frame
        except AttributeError:
            found = frames.frame = _Frame(self._parameters, self._threads, self._smem, self._attributes())
        return found

    def _attributes(self) -> Sequence[_Attribute]:
        found = []
        if self._cluster > 1:
            found.append(_Attribute(_CLUSTER_DIMENSION, 0, (c_uint * 16)(self._cluster, 1, 1)))
        if self._pdl:
            found.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (c_uint * 16)(1)))
        return found


class _Frame:
    """What a launch hands to the driver. Every thread has its own; the driver has read it when it returns."""

    def __init__(self, parameters: Parameters, threads: int, smem: int, attributes: Sequence[_Attribute]) -> None:
        self.buffer = ctypes.create_string_buffer(max(parameters.size, 1))
        start, offsets = ctypes.addressof(self.buffer), parameters.offsets
        self.parameters = (c_void_p * len(offsets))(*(start + offset for offset in offsets))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self.config = _Config(1, 1, 1, threads, 1, 1, smem, None, self._attributes, len(attributes))
        self.reference = ctypes.byref(self.config)
