"""Checks of tensor arguments that every operation shares; each raises InputError before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

FP8 = torch.float8_e4m3fn
_ALIGNMENT = 16  # bytes; the kernels are compiled for it, so that loads are 16 bytes wide


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | None],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    like: Tensor | None = None,
    inner_contiguous: bool = False,
) -> Tensor:
    """Check one tensor argument and return it.

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
        if value.numel() and value.stride(-1) != 1:
            raise InputError(name, f"strides {value.stride()}", "a contiguous last dimension")
    elif not value.is_contiguous():
        raise InputError(name, f"strides {value.stride()}", "a contiguous tensor (call .contiguous())")
    if value.device.type == "cuda" and not _is_fake(value) and value.data_ptr() % _ALIGNMENT:
        raise InputError(name, f"an address that {_ALIGNMENT} does not divide", "a 16-byte aligned tensor (call .clone())")
    return value


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InputError(name, repr(value), "one of " + ", ".join(map(repr, allowed)))


def _is_fake(value: Tensor) -> bool:
    return type(value) is not Tensor and hasattr(value, "fake_mode")
