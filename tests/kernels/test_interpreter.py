"""Triton's interpreter as it is corrected here: a reduction by any function keeps to the order of the axis."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsa_codegen.kernels.backends.interpreter import repair

A, B, C = 2, 8, 4


@triton.jit
def last(left, right):
    return right


@triton.jit
def later_of_larger(value, place, other, other_place):
    wins = other >= value
    return tl.where(wins, other, value), tl.where(wins, other_place, place)


@triton.jit
def reduce_by_own_functions(x, lasts, end, tops, places, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    a, b, c = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    tile = tl.load(x + (a * B + b) * C + c)
    rows, columns = tl.arange(0, A)[:, None], tl.arange(0, C)[None, :]
    tl.store(lasts + rows * C + columns, tl.reduce(tile, 1, last))
    tl.store(end, tl.reduce(tile, None, last))
    top, place = tl.reduce((tile, tl.broadcast_to(b, (A, B, C))), 1, later_of_larger, keep_dims=True)
    tl.store(tops + a * C + c, top)
    tl.store(places + a * C + c, place)


def reduced(values: list) -> list[list]:
    """A job for the interpreter's worker."""
    repair()
    x = torch.tensor(values, dtype=torch.bfloat16)
    outputs = torch.empty(A, C, dtype=x.dtype), torch.empty(1, dtype=x.dtype), torch.empty(A, C), torch.empty(A, C)
    reduce_by_own_functions[(1,)](x, *outputs, A, B, C)
    return [output.tolist() for output in outputs]


def test_reductions_by_own_functions(interpreter):
    x = torch.randint(0, 4, (A, B, C), generator=torch.Generator().manual_seed(3)).float()  # of ties the later place
    lasts, end, tops, places = interpreter.call(reduced, x.tolist())
    assert lasts == x[:, -1].tolist()
    assert end == [x.flatten()[-1].item()]
    assert tops == x.amax(1).tolist()
    assert places == (B - 1 - x.flip(1).argmax(1)).tolist()
