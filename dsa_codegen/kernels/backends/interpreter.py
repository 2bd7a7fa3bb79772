"""Corrections of Triton's interpreter, 3.6 to 3.9, without which kernels cannot be verified on the CPU.

It keeps bf16 as 16-bit patterns: ``tl.dot`` multiplies those integers, and fp32 -> bf16 truncates where a GPU rounds to
nearest even (truncated probabilities alone put attention at a similarity of 1.2e-5). fp32 -> e4m3 rounds, but loses the carry
into the exponent: 127 becomes 64; e4m3's NaN is read as 480. A constant of the module that meets a tensor makes a constant that
holds a tensor: from 3.7 on, most functions refuse it. What a scalar comparison gives becomes int32 where it is broadcast: 3.9
refuses it as a mask. 3.6 makes an index of an array with one entry, which numpy refuses from 2.4 on. A reduction by a function
of the module's own goes through the tile element by element: 10 of the 11 s of quantising 130 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = [
    name
    for operator in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), "lt", "le", "gt", "ge", "eq", "ne")
    if (name := f"__{operator}__") in vars(tl.constexpr)
]


@functools.cache
def repair() -> None:
    """Correct the interpreter of this process; further calls do nothing."""
    dot, cast, convert = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    splat, lend = InterpreterBuilder.create_splat, interpreter._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _exact(_widened(a)), _exact(_widened(b)), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        rounds = source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16
        return TensorHandle(_rounded(source.data), tl.bfloat16) if rounds else cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if source.dtype.scalar == tl.float8e4nv:
            return convert(self, _exact(source), to, rounding) if to.scalar != tl.float32 else _exact(source)
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.float8e4nv):
            return convert(self, source, to, rounding)
        values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).to(torch.float8_e4m3fn)
        return TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)

    def create_splat(self: Any, shape: Any, source: Any) -> Any:
        return splat(self, shape, TensorHandle(source.data, tl.int1) if source.data.dtype == np.bool_ else source)

    def lend_methods(tensor: Any, scope: Any) -> None:
        lend(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = lend_methods
    ReduceOps.generic_reduce = _reduced_by_halves
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_splat = create_splat
    for name in _OPERATORS:
        setattr(tl.constexpr, name, _unwrapping(getattr(tl.constexpr, name)))


def _reduced_by_halves(self: Any, given: Any) -> list[Any]:
    """``tl.reduce`` by any associative function: neighbours along the axis are combined, all at once, until one is left."""
    values, axis = self.unravel(given, self.axis)
    kinds = [value.dtype for value in values]
    parts = [np.moveaxis(value.handle.data, axis, 0) for value in values]
    while len(parts[0]) > 1:
        sides = [self.to_tensor(part[side::2], kind) for side in (0, 1) for part, kind in zip(parts, kinds, strict=True)]
        combined = self.combine_fn.fn(*sides)
        parts = [part.handle.data for part in (combined if isinstance(combined, tuple) else (combined,))]
    shape = values[0].handle.data.shape
    kept = tuple(1 if place == axis else size for place, size in enumerate(shape))
    if self.axis is None:
        kept = (1,) * len(given[0].handle.data.shape)
    shape = kept if self.keep_dims else shape[:axis] + shape[axis + 1 :]
    return [self.to_tensor(part.reshape(shape), kind) for part, kind in zip(parts, kinds, strict=True)]


def _unwrapping(operator: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The operator of a constant, whose result with a tensor is a tensor, as it is where kernels are compiled."""

    def operate(self: Any, other: Any) -> Any:
        result = operator(self, other)
        return result.value if isinstance(getattr(result, "value", None), tl.tensor) else result

    return operate


def _exact(operand: Any) -> Any:
    """fp32 of e4m3, NaN included; anything else as it is."""
    if operand.dtype.scalar != tl.float8e4nv:
        return operand
    values = torch.from_numpy(np.ascontiguousarray(operand.data)).view(torch.float8_e4m3fn)
    return TensorHandle(values.float().numpy(), tl.float32)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bf16 pattern nearest to each fp32 number, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
