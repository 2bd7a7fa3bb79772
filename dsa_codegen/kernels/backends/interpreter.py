"""Three corrections of Triton 3.6's interpreter, without which bf16 and FP8 kernels cannot be verified on the CPU.

It keeps bf16 as 16-bit patterns: ``tl.dot`` multiplies those integers, and fp32 -> bf16 truncates where a GPU rounds to
nearest even (truncated probabilities alone put attention at a similarity of 1.2e-5). fp32 -> e4m3 rounds, but loses the carry
into the exponent: 127 becomes 64.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@functools.cache
def repair() -> None:
    """Correct the interpreter of this process; further calls do nothing."""
    dot, cast, convert = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        rounds = source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16
        return TensorHandle(_rounded(source.data), tl.bfloat16) if rounds else cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.float8e4nv):
            return convert(self, source, to, rounding)
        values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).to(torch.float8_e4m3fn)
        return TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bf16 pattern nearest to each fp32 number, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
