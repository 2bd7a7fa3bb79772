"""Rows in turns: where each row is split into as many parts as every other, the parts of all rows would take tens of GB."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ...problem.op import Inputs, Outputs

_ALIGNED = 4  # rows: kernels take lists of numbers on addresses of 16 bytes
_LISTED = ("indices", "lengths", "extra_indices", "extra_lengths")


def in_turns(inputs: Inputs, outputs: Outputs, most: int) -> Iterator[tuple[Inputs, Outputs]]:
    """(inputs, outputs) of some rows at a time, in order: parts of those of a call.

    Args:
        most: rows of a turn at most, a few hundred.
    """
    batch, next_n = inputs["q"].shape[:2]
    most = max(most // _ALIGNED * _ALIGNED, _ALIGNED)
    if next_n > most:
        sequences = [
            (slice(each, each + 1), slice(first, first + most)) for each in range(batch) for first in range(0, next_n, most)
        ]
    else:
        step = max(most // max(next_n, 1) // _ALIGNED * _ALIGNED, 1)
        sequences = [(slice(first, first + step), slice(None)) for first in range(0, batch, step)]
    for rows, newest in sequences:
        yield (
            {**inputs, **{name: _part(inputs[name], rows, newest) for name in ("q", *_LISTED)}},
            {name: value[rows, newest] for name, value in outputs.items()},
        )


def _part(value: Tensor | None, rows: slice, newest: slice) -> Tensor | None:
    """Of an input, on an aligned address; lengths of sequences are one number for all of their rows."""
    if value is None:
        return None
    part = value[rows] if value.dim() == 1 else value[rows, newest]
    return part.clone() if part.data_ptr() % 16 else part
