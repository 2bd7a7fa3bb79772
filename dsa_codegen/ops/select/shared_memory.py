"""The size of a struct in shared memory, which a launch must ask for."""

from __future__ import annotations

from collections.abc import Iterable

_ALIGNMENT = 16  # of the struct itself


def size_of(members: Iterable[tuple[int, int]]) -> int:
    """sizeof of a struct: (alignment, bytes) of its members in order."""
    offset = 0
    for alignment, size in [*members, (_ALIGNMENT, 0)]:
        offset = -(-offset // alignment) * alignment + size
    return offset
