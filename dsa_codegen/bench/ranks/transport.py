"""What ranks exchange while something runs: how many bytes, how long that takes alone, and what it adds to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...distributed import gather


@contextmanager
def noted() -> Iterator[list[int]]:
    """The bytes of every message that this rank sends inside the block, in order; negative where each gets a part."""
    sizes: list[int] = []
    start, exchange = gather._start, gather._exchange

    def note(sent: Tensor, group: Any, wait: bool) -> tuple[Tensor, Any]:
        sizes.append(len(sent))
        return start(sent, group, wait)

    def note_exchange(sent: Tensor, group: Any) -> Tensor:
        sizes.append(-sent.numel())
        return exchange(sent, group)

    gather._start, gather._exchange = note, note_exchange
    try:
        yield sizes
    finally:
        gather._start, gather._exchange = start, exchange


@contextmanager
def absent(world: int) -> Iterator[None]:
    """Inside the block nothing is exchanged: every rank takes its own message for those of all others.

    Results are not those of the step; as much is computed, on numbers of the same kind.
    """
    start, exchange = gather._start, gather._exchange
    gather._start = lambda sent, group, wait: (sent.expand(world, len(sent)).contiguous(), None)
    gather._exchange = lambda sent, group: sent.clone()
    try:
        yield
    finally:
        gather._start, gather._exchange = start, exchange


class Messages:
    """The collectives of a step without its arithmetic."""

    def __init__(self, sizes: list[int], world: int, group: Any, device: torch.device) -> None:
        self._group = group
        shapes = [(size,) if size >= 0 else (world, -size // world) for size in sizes]
        self._sent = [torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes]

    def __call__(self) -> None:
        for sent in self._sent:
            if sent.dim() == 1:
                gather._start(sent, self._group, True)
            else:
                gather._exchange(sent, self._group)
