"""Blocks that fill every wave of a GPU: whole waves of them run as they are, the rest is split so that the last is full too."""

from __future__ import annotations

_START = 1.5  # what a block costs beside its tiles (its operands, its first loads), in tiles; 2 us on an H200
_MOST_WAVES = 8  # for the split rest: shares that small cost more than a full last wave gains


def share_out(blocks: int, slots: int, tiles: int) -> tuple[int, int]:
    """(blocks that stay whole, parts that each of the others is split into), for equal blocks of ``tiles`` tiles.

    ``slots`` is how many blocks the GPU runs at a time. The first blocks stay whole: launch the longest first.
    """
    rest = blocks % slots
    if not rest:
        return blocks, 1

    def parts(waves: int) -> int:
        return max(1, min(waves * slots // rest, tiles))

    def duration(waves: int) -> float:
        return waves * (-(-tiles // parts(waves)) + _START)

    return blocks - rest, parts(min(range(1, _MOST_WAVES + 1), key=duration))
