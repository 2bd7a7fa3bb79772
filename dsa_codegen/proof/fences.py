"""Fences: known bytes on both sides of outputs, so that a kernel which writes beside them is found, whatever it computes.

Elsewhere such a write lands in a neighbour's tensor, and the neighbour is blamed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem.op import Accuracy, Inputs, Outputs

BYTES = 4096  # on either side; a multiple of every alignment that kernels are promised
_PATTERN = 0xA7
STRAY = Accuracy(False, 0.0, 0.0, "it writes beside its outputs", stray=True)
"""What is said of a kernel that broke a fence."""


def fenced(outputs: Outputs, inputs: Inputs) -> tuple[Outputs, list[Tensor]]:
    """The outputs moved between fences, with their strides, and the fences (uint8); written inputs stay where they are."""
    own = {value.untyped_storage().data_ptr() for value in inputs.values() if isinstance(value, Tensor)}
    rooms: dict[int, Tensor] = {}
    moved = {}
    for name, tensor in outputs.items():
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if not size or place in own:
            moved[name] = tensor
            continue
        if place not in rooms:
            rooms[place] = torch.full((size + 2 * BYTES,), _PATTERN, dtype=torch.uint8, device=tensor.device)
        moved[name] = _inside(rooms[place], tensor)
    return moved, [side for room in rooms.values() for side in (room[:BYTES], room[-BYTES:])]


def _inside(room: Tensor, tensor: Tensor) -> Tensor:
    offset = BYTES // tensor.element_size() + tensor.storage_offset()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(room.untyped_storage(), offset, tensor.size(), tensor.stride())


def broken(fences: Sequence[Tensor]) -> bool:
    """Whether anything was written to a fence; waits for the GPU."""
    return any(bool((side != _PATTERN).any()) for side in fences)
