"""Blocks that keep a GPU full to the end: the first run whole, the others are split, so that all places finish together."""

from __future__ import annotations

import functools
import math
from heapq import heapreplace

_START = 0.6  # what a program costs beside its tiles (its operands, its first loads), in tiles; 0.8 us on an H200
_PLACES = 24  # of the GPU that is played through: a coarse one says the same as a real one, 16 times as fast
_MOST_WAVES = 8  # of split blocks: smaller shares cost more than they gain
_HALVES = 5  # whole blocks end at a full wave, or up to so many half waves before
_BITS = 5  # of a number of tiles that count: a context that grows from chunk to chunk is another one only now and then


def until_done(blocks: int, slots: int, tiles: int, whole: int, splits: int, start: float) -> float:
    """When blocks of ``tiles`` each are done, in tiles: ``whole`` of them as they are, the others as ``splits`` programs.

    ``slots`` programs run at a time, and ``start`` tiles pass before each does its first; ``whole`` fills waves.
    """
    waves = -(-(blocks - whole) * splits // slots)
    return whole // slots * (start + tiles) + waves * (start + -(-tiles // splits))


def share_out(blocks: int, slots: int, longest: int, shortest: int) -> tuple[int, int]:
    """(blocks that stay whole, parts that each of the others is split into), so that all are done soonest.

    ``slots`` is how many blocks the GPU runs at a time. Blocks start the longest first: their tiles fall evenly from
    ``longest`` >= 1 to ``shortest``. If they are others in truth, the same work is done and ends less evenly.
    """
    most = _rounded(longest)
    return _played(blocks, slots, most, max(most - _rounded(longest - shortest), 0))


def _rounded(tiles: int) -> int:
    """Down to 5 binary digits: 3 % less at most."""
    shift = max(tiles.bit_length() - _BITS, 0)
    return tiles >> shift << shift


@functools.lru_cache(maxsize=1 << 12)  # about 1 ms
def _played(blocks: int, slots: int, longest: int, shortest: int) -> tuple[int, int]:
    best, least = (0, 1), math.inf
    for halves in range(_HALVES):
        whole = (2 * (blocks // slots) - halves) * slots // 2
        if whole < 0:
            break
        rest = blocks - whole
        for parts in {1, *(min(waves * slots // rest, longest) for waves in range(1, _MOST_WAVES + 1))} if rest else {1}:
            end = _end(blocks, slots, longest, shortest, whole, parts) if parts else math.inf
            if end < least:
                best, least = (whole, parts), end
    return best


def _end(blocks: int, slots: int, longest: int, shortest: int, whole: int, parts: int) -> float:
    """When the last of ``slots`` places is done, in tiles: each program goes to the place that is free first."""
    busy = [0.0] * min(slots, _PLACES)
    step = slots / len(busy)  # one program stands for so many
    slope = (longest - shortest) / blocks
    for number in range(math.ceil((whole + (blocks - whole) * parts) / step)):
        program = int(number * step)
        if program < whole:
            tiles = longest - slope * program
        else:
            tiles = math.ceil((longest - slope * (whole + (program - whole) // parts)) / parts)
        heapreplace(busy, busy[0] + _START + tiles)
    return max(busy)
