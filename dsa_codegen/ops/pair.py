"""Blocks that score pairs of tiles (CUDA C++, Hopper): what they ask for, shared by sparse and by dense MLA."""

from __future__ import annotations

from ..problem.values import Scalar

HEADS = 64
"""Of a block; 128 are two blocks'."""
THREADS = 384
"""Two groups of 128 multiply, one gathers."""
REGISTERS = 168
"""Per thread of such a block."""
_SPLIT = 2  # parts of a half of a tile, which are freed one by one
_BARRIER = 8  # bytes
_BARRIERS = 25


def smem(d_qk: int, max_logits: bool = False) -> int:
    """Bytes of shared memory per block: two tiles and q, weights, masks, peaks and totals (and tops), barriers."""
    return 3 * 128 * d_qk + 64 * 128 + 2 * _BARRIER + (5 if max_logits else 4) * 256 + _BARRIERS * _BARRIER


def gatherers_registers(consumer_registers: int) -> int:
    """What the threads that multiply leave to one that gathers."""
    return 3 * REGISTERS - 2 * consumer_registers


def derived(
    d_qk: int,
    consumer_registers: int,
    max_logits: bool = False,
    divides: bool = False,
    lines: bool = False,
    value_tokens: int = 64,
) -> dict[str, Scalar]:
    """Names for the template.

    Args:
        divides: whether the last lists may be cut.
        lines: whether the L2 brings 128 bytes at a time, not 256.
        value_tokens: how many tokens' values are added up at a time, as their weights come; 64 are a whole tile's.
    """
    return {
        "threads": THREADS,
        "producer_registers": gatherers_registers(consumer_registers),
        "smem": smem(d_qk, max_logits),
        "split": _SPLIT,
        "divides": divides,
        "lines": lines,
        "sweep": False,  # of sorted lists, which only some have
        "value_tokens": value_tokens,
    }
