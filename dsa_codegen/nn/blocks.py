"""Products whose bits do not depend on how many rows come together: as many as there are, a fixed number at a time.

What torch multiplies with chooses its kernel, and so the order of its sums, by the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 128  # of a block on a GPU: one tile of its products. On a CPU the place in a block shows in the bits: one row at a time


def in_blocks(multiply: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``multiply(rows)`` in blocks of rows that are all of one size, the last filled up with zeros.

    Args:
        multiply: of [n, ...], each of whose rows follows from its own row.
        rows: [n, ...].
    """
    size = _ROWS if rows.is_cuda else 1
    if not len(rows):
        return multiply(rows)
    filled = torch.cat([rows, rows.new_zeros(-len(rows) % size, *rows.shape[1:])])
    return torch.cat([multiply(block) for block in filled.split(size)])[: len(rows)]
