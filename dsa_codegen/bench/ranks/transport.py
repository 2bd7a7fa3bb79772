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
    """The bytes of every message that this rank sends inside the block, in order."""
    sizes: list[int] = []
    start = gather._start

    def note(sent: Tensor, group: Any, wait: bool) -> tuple[Tensor, Any]:
        sizes.append(len(sent))
        return start(sent, group, wait)

    gather._start = note
    try:
        yield sizes
    finally:
        gather._start = start


@contextmanager
def absent(world: int) -> Iterator[None]:
    """Inside the block nothing is exchanged: every rank takes its own message for those of all others.

    Results are not those of the step; as much is computed, on numbers of the same kind.
    """
    start = gather._start
    gather._start = lambda sent, group, wait: (sent.expand(world, len(sent)).contiguous(), None)
    try:
        yield
    finally:
        gather._start = start


class Messages:
    """The collectives of a step without its arithmetic."""

    def __init__(self, sizes: list[int], group: Any, device: torch.device) -> None:
        self._group = group
        self._sent = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]

    def __call__(self) -> None:
        for sent in self._sent:
            gather._start(sent, self._group, True)
