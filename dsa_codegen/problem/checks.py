"""Checks of tensor arguments that every operation shares; each raises InputError before anything is launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

FP8 = torch.float8_e4m3fn
_ALIGNMENT = 16  # bytes; the kernels are compiled for it, so that loads are 16 bytes wide
_ALIGNED = "cuda"  # where kernels run; the references take any address
_MOST_APART = (1 << 31) - 1  # elements between rows: kernels take strides of 32 bits


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | None],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    like: Tensor | None = None,
    inner_contiguous: bool = False,
) -> Tensor:
    """Check one tensor argument and return it; where all dimensions must be contiguous, ``settled``.

    Args:
        shape: sizes by dimension; None where any size is allowed.
        dtypes: the dtype, or those allowed.
        like: a tensor whose device it must share.
        inner_contiguous: only the last dimension must be contiguous (rows may be strided); by default all must be.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if not isinstance(value, Tensor):
        raise InputError(name, type(value).__name__, "a tensor")
    if value.dtype not in allowed:
        raise InputError(name, str(value.dtype), " or ".join(map(str, allowed)))
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if value.dim() != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape, strict=True)):
        raise InputError(name, f"shape {list(value.shape)}", f"shape {wanted}")
    if like is not None and value.device != like.device:
        raise InputError(name, f"a tensor on {value.device}", f"one on {like.device}, like the other arguments")
    if inner_contiguous:
        if value.numel() and value.shape[-1] > 1 and value.stride(-1) != 1:
            raise InputError(name, f"strides {value.stride()}", "a contiguous last dimension, as kernels load whole rows")
    elif not value.is_contiguous():
        raise InputError(name, f"strides {value.stride()}", "a contiguous tensor (call .contiguous())")
    if value.device.type == _ALIGNED and not _traced(value) and value.data_ptr() % _ALIGNMENT:
        raise InputError(name, f"an address that {_ALIGNMENT} does not divide", "a 16-byte aligned tensor (call .clone())")
    return value if inner_contiguous else settled(value)


def floating(value: object) -> tuple[torch.dtype, ...]:
    """The dtypes of unquantised arguments: what the kernels multiply, and where none runs what the reference computes in."""
    on_gpu = isinstance(value, Tensor) and value.device.type == "cuda"
    return (torch.bfloat16,) if on_gpu else (torch.bfloat16, torch.float32, torch.float64)


def rows(
    name: str,
    value: object,
    shape: Sequence[int | None],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    like: Tensor | None = None,
    whole: bool = True,
) -> Tensor:
    """Check a tensor whose rows may be parts of wider ones (a projection, a cache of several layers) and return it.

    Args:
        shape, dtypes, like: as for ``tensor``.
        whole: rows are loaded 16 bytes at a time, and so lie a multiple of that apart; otherwise any number of elements.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    checked = tensor(name, value, shape, dtypes, like, inner_contiguous=True)
    for size, stride in zip(checked.shape[:-1], checked.stride()[:-1], strict=True):
        if size > 1 and whole and (stride < checked.shape[-1] or stride * checked.element_size() % _ALIGNMENT):
            apart = _ALIGNMENT // checked.element_size()
            allowed = f"rows that do not overlap, a multiple of {apart} elements apart, as kernels load 16 bytes at a time"
            raise InputError(name, f"strides {checked.stride()}", allowed)
        if size > 1 and stride > _MOST_APART:
            raise InputError(name, f"strides {checked.stride()}", f"rows at most {_MOST_APART} elements apart")
    return checked


def pieces(value: Tensor, dimension: int) -> int:
    """``step`` in pieces of 16 bytes: kernels multiply it with a constant, so that compilers know loads to be aligned."""
    return step(value, dimension) * value.element_size() // _ALIGNMENT


def step(value: Tensor, dimension: int) -> int:
    """Elements from one row to the next, for a kernel's 32-bit argument; 0 where there is one, whose stride may be anything."""
    return value.stride(dimension) if value.shape[dimension] > 1 else 0


def settled(value: Tensor) -> Tensor:
    """The tensor, or a view of it in which dimensions of size 1 have the strides that packed ones would have.

    Torch leaves any stride there, as nothing steps along them; launchers that encode or compare strides would stumble.
    """
    if _is_fake(value) or 1 not in value.shape or not value.numel():
        return value
    strides = settled_strides(value.shape, value.stride())
    return value if strides == value.stride() else value.as_strided(value.shape, strides)


def settled_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides, with those of packed dimensions where the size is 1."""
    found, packed = list(strides), 1
    for place in reversed(range(len(shape))):
        if shape[place] == 1:
            found[place] = packed
        packed = shape[place] * found[place]
    return tuple(found)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a tensor", lambda value: isinstance(value, Tensor)),
    "int": ("a whole number", lambda value: isinstance(value, torch.SymInt) or _plain(value, "__index__")),
    "float": ("a number", lambda value: isinstance(value, torch.SymFloat) or _plain(value, "__float__")),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "str": ("a string", lambda value: isinstance(value, str)),
}
"""For each type of an operator's schema: how it is called, and whether torch takes a value for it."""


def check_kind(name: str, value: object, kind: str) -> None:
    """Raise InputError unless ``value`` is of a schema's type ("Tensor", "Optional[int]", …), which torch says less plainly."""
    inner = kind.removeprefix("Optional[").removesuffix("]")
    if value is None and inner != kind:
        return
    called, fits = _KINDS[inner]
    if not fits(value):
        shown = repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
        raise InputError(name, shown, called if inner == kind else f"{called}, or None")


def _plain(value: object, conversion: str) -> bool:
    """Whether a value converts to a number, and is no truth value; a tensor of none but one number does."""
    return hasattr(value, conversion) and not isinstance(value, bool) and not (isinstance(value, Tensor) and value.dim())


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InputError(name, repr(value), "one of " + ", ".join(map(repr, allowed)))


def _traced(value: Tensor) -> bool:
    """Whether a trace looks at it, in which no tensor has an address: the operator checks it when it runs."""
    return torch.compiler.is_compiling() or _is_fake(value)


def _is_fake(value: Tensor) -> bool:
    return type(value) is not Tensor and hasattr(value, "fake_mode")
