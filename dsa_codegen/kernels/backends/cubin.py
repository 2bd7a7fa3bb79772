"""Triton's machine code through CUDA's driver: what was built ahead runs under any Triton, without a C compiler.

Triton's own launcher is C code that it compiles where the kernel is launched, and it reads what its own version wrote. All that
a launch needs lies beside the code: the arguments' types, and the threads, shared memory and tiles in the kernel's ``.json``.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int, c_uint, c_uint32, c_uint64, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..render import release
from .base import Launchable
from .descriptors import Views, places_of, rank_of
from .driver import CudaKernel, Recipe, check, library, load_module

_TYPES_FILE = "types.json"
_KNOWN = (3, 6), (3, 9)
"""Releases whose kernels end in two addresses of scratch memory, and whose descriptors are followed by shape and strides."""
_KINDS = {"i32": "i32", "i64": "i64", "fp32": "f32", "fp64": "f64"}
_SCRATCH = ("ptr", "ptr")
SCRATCH = len(_SCRATCH)
"""Addresses behind a kernel's arguments, zero where it needs no such memory."""
_TYPES = {8: 10, 9: 8, 10: 9}
"""CUtensorMapDataType of Triton's element types, where they differ."""
_L2_PROMOTION_128B = 2


def serves(out: Path) -> bool:
    """Whether all that Triton compiled into ``out`` can be launched without it."""
    return all(_known(_facts(out, kernel)) for kernel in types_of(out))


def load(out: Path) -> Mapping[str, Launchable]:
    """The kernels that Triton compiled into ``out``, on the current device.

    Raises:
        ToolMissing: there is no driver.
    """
    return {
        kernel: TritonCubin((out / f"{kernel}.cubin").read_bytes(), types, _facts(out, kernel))
        for kernel, types in types_of(out).items()
    }


def types_of(out: Path) -> dict[str, list[str]]:
    """Triton's words for each kernel's arguments, as ``write_types`` left them."""
    found: dict[str, list[str]] = json.loads((out / _TYPES_FILE).read_text())
    return found


def write_types(signatures: Mapping[str, Mapping[str, str]], out: Path) -> None:
    """Leave a module's SIGNATURES beside the machine code: the module imports a Triton that may not be the one here."""
    (out / _TYPES_FILE).write_text(json.dumps({kernel: list(types.values()) for kernel, types in signatures.items()}))


def parameters(types: Sequence[str]) -> tuple[str, ...]:
    """The kinds of a kernel's parameters, in the words of ``driver``, from Triton's words for its arguments."""
    kinds: list[str] = []
    for kind in (kind.removesuffix(":16") for kind in types):
        rank = rank_of(kind)
        if rank:
            kinds += ["map", *["i32"] * rank, *["i64"] * rank]
        else:
            kinds.append("ptr" if kind.startswith("*") else _KINDS[kind])
    return (*kinds, *_SCRATCH)


def _facts(out: Path, kernel: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{kernel}.json").read_text())
    return found


def _known(facts: Mapping[str, Any]) -> bool:
    """Whether the parameters are as here, and nothing is asked for that only Triton's launcher gives."""
    asks = any(facts.get(name) for name in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"))
    return _KNOWN[0] <= release(facts["triton_version"]) <= _KNOWN[1] and not asks


class TritonCubin(CudaKernel):
    """A ``Launchable``; its device is the one that is current when it is made.

    Args:
        cubin: machine code.
        types: of the arguments, as SIGNATURES states them.
        facts: Triton's own account of the kernel.
    """

    def __init__(self, cubin: bytes, types: Sequence[str], facts: Mapping[str, Any]) -> None:
        threads, cluster, pdl = facts["num_warps"] * 32, facts["num_ctas"], bool(facts.get("launch_pdl"))
        super().__init__(load_module(cubin), facts["name"], parameters(types), threads, facts["shared"], cluster, pdl)
        self._described = tuple(facts.get("tensordesc_meta") or ())
        self._expanded = Views(places_of(types), self._described, encode)

    @property
    def recipe(self) -> Recipe | None:
        plain = super().recipe
        return replace(plain, described=self._described, hidden=SCRATCH) if plain and self._expanded.known else None

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        super().__call__(grid, (*self._expanded(args), 0, 0))

    def bound(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        launch = super().bound(grid)
        if self._expanded:
            return lambda *args: launch(*self._expanded(args), 0, 0)
        return lambda *args: launch(*args, 0, 0)


def encode(view: Any, described: Mapping[str, Any]) -> list[Any]:
    """The view's descriptor, shape and strides, for the tile that ``described`` states."""
    rank, size = len(view.shape), described["elem_size"]
    innermost_first = view.shape[::-1], [stride * size for stride in view.strides[-2::-1]], described["block_size"][::-1]
    encoded = ctypes.create_string_buffer(128 + 64)
    start = (ctypes.addressof(encoded) + 63) // 64 * 64  # the driver refuses another alignment
    code = library().cuTensorMapEncodeTiled(
        c_void_p(start),
        c_int(_TYPES.get(described["elem_type"], described["elem_type"])),
        c_uint(rank),
        c_void_p(view.data_ptr()),
        (c_uint64 * rank)(*innermost_first[0]),
        (c_uint64 * rank)(*innermost_first[1]),
        (c_uint32 * rank)(*innermost_first[2]),
        (c_uint32 * rank)(*[1] * rank),
        c_int(0),
        c_int(described["swizzle"]),
        c_int(_L2_PROMOTION_128B),
        c_int(0),
    )
    check(code, f"a descriptor of {tuple(view.shape)} with strides {tuple(view.strides)}")
    return [ctypes.string_at(start, 128), *view.shape, *view.strides]
