"""Blocks that fill every wave of a GPU: whole waves of them run as they are, the rest is split so that the last is full too."""

from __future__ import annotations

import functools
import math

_START = 1.5  # what a block costs beside its tiles (its operands, its first loads), in tiles; 2 us on an H200
_MOST_WAVES = 8  # for the split rest: shares that small cost more than a full last wave gains


@functools.lru_cache(maxsize=1 << 12)  # it runs at every launch: 0.1 us where it is known, 2 us otherwise
def share_out(blocks: int, slots: int, tiles: int) -> tuple[int, int]:
    """(blocks that stay whole, parts that each of the others is split into), for equal blocks of ``tiles`` >= 1 tiles.

    ``slots`` is how many blocks the GPU runs at a time. The first blocks stay whole: launch the longest first.
    """
    rest = blocks % slots
    splits, least = 1, math.inf
    for waves in range(1, _MOST_WAVES + 1) if rest else ():
        parts = min(waves * slots // rest, tiles)
        duration = waves * (-(-tiles // parts) + _START)
        if duration < least:
            splits, least = parts, duration
    return blocks - rest, splits
