"""Rows of the indexer dealt out to ranks, so that each scores about as many keys."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from torch import Tensor

from ..errors import SpecError


def keys_seen(starts: Tensor, ends: Tensor, tokens: int) -> list[int]:
    """How many keys each row sees, on the host. Windows on a GPU are waited for: an engine that knows them passes bounds."""
    return (ends.clamp(0, tokens) - starts.clamp(0, tokens)).clamp(min=0).tolist()


def balanced_bounds(keys: Sequence[int], world: int) -> list[int]:
    """Where each rank's consecutive rows begin and end: rank r has the rows ``bounds[r]`` to ``bounds[r + 1] - 1``.

    No rank has more than its share of the keys and one row beside it (a row costs as one key more than it sees). Rows stay
    consecutive, because neighbours share loads of keys in the kernels. Everything is whole numbers: ranks agree.

    Args:
        keys: how many each row sees.
        world: ranks; more than rows leaves some without.

    Returns:
        world + 1 row numbers, from 0 to len(keys).
    """
    if world < 1:
        raise SpecError("world", world, "1 or more")
    before = [0, *itertools.accumulate(seen + 1 for seen in keys)]
    # The first row with so much before it, in whole numbers: before >= rank · total / world.
    return [bisect.bisect_left(before, -(-rank * before[-1] // world)) for rank in range(world + 1)]
