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
_STEP = 8  # bytes of the number that the other block of a cluster writes
_APART = 1  # pairs of tiles


def smem(d_qk: int, max_logits: bool = False, together: bool = False) -> int:
    """Bytes of shared memory per block: two tiles and q, weights, masks, peaks and totals (and tops), barriers, a step."""
    facts = (5 if max_logits else 4) * 256
    return 3 * 128 * d_qk + 64 * 128 + 2 * _BARRIER + facts + _BARRIERS * _BARRIER + (_STEP if together else 0)


def gatherers_registers(consumer_registers: int) -> int:
    """What the threads that multiply leave to one that gathers."""
    return 3 * REGISTERS - 2 * consumer_registers


def derived(
    d_qk: int,
    consumer_registers: int,
    max_logits: bool = False,
    divides: bool = False,
    together: bool = False,
    held: bool = False,
    lines: bool = False,
) -> dict[str, Scalar]:
    """Names for the template.

    Args:
        divides: whether the last lists may be cut.
        together: whether the two blocks of 128 heads of a query keep in step.
        lines: whether the L2 brings 128 bytes at a time, not 256.
        held: whether parts of tiles wait in registers; of blocks that keep in step each gathers half, and stores it in both.
    """
    return {
        "threads": THREADS,
        "producer_registers": gatherers_registers(consumer_registers),
        "smem": smem(d_qk, max_logits, together),
        "split": _SPLIT,
        "divides": divides,
        "cluster": 2 if together else 1,
        "apart": _APART,
        "held": held,
        "lines": lines,
        "shares": held and together,
    }
