"""Which channels attention takes: those of a token's value, those that are key only, and how kernels pad them.

In memory nothing is padded. Kernels take tiles whose sides are powers of two: channels beyond a row's are neither read nor
written, and cost arithmetic alone.
"""

from __future__ import annotations

from ..errors import InputError
from .values import Value, next_power_of_two

D_V = 512
"""Channels of a token that are also its value, unless a spec says otherwise: those of DeepSeek-V3.2 and V4, GLM-5, Hy4."""
LEAST, MOST = 64, 512
STEP = 16
"""What matrix units take at a time; rows of it lie 32 bytes apart, so that loads are aligned."""
MOST_TAIL = 128
INDEX_WIDTHS = tuple(range(32, 257, 16))
"""Channels of the indexer's heads."""
MOST_INDEX_HEADS = 64
ROW_WIDTHS = tuple(range(32, MOST + MOST_TAIL + 1, STEP))
"""Channels of rows that are quantised with a scale each: the indexer's, and those of attention's queries and tokens."""


def require(spec: Value, d_qk: str = "d_qk", d_v: str = "d_v") -> None:
    """Raise SpecError unless a spec's channels are some that kernels take: d_v of value, and up to 128 that are key only."""
    spec.require_range(d_v, LEAST, MOST, STEP)
    value = getattr(spec, d_v)
    spec.require_range(d_qk, value, value + MOST_TAIL, STEP)


def check(name: str, came: int, d_v: int) -> None:
    """The same of an argument with ``came`` channels, of which a caller says that ``d_v`` are the value.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    if not LEAST <= d_v <= MOST or d_v % STEP:
        raise InputError("d_v", d_v, f"{LEAST} to {MOST} in steps of {STEP}")
    if not d_v <= came <= d_v + MOST_TAIL or came % STEP:
        raise InputError(name, f"{came} channels", f"{d_v} to {d_v + MOST_TAIL} in steps of {STEP}, where d_v is {d_v}")


def usual(d_qk: int, d_v: int) -> bool:
    """Whether they are DeepSeek's, 512 of value and 64 more or none: those that kernels for Hopper alone are built for."""
    return d_v == D_V and d_qk in (D_V, D_V + 64)


def padded(d_qk: int, d_v: int) -> int:
    """Channels of a token in kernels that pad value and tail each to a power of two."""
    return padded_to(d_v) + padded_to(d_qk - d_v)


def padded_to(width: int) -> int:
    """A power of two; none of none."""
    return next_power_of_two(width) if width else 0
