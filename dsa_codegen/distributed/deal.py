"""Which rows of a sequence each rank has while it is prefilled: dealt out so that ranks see about as many keys."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError, SpecError


class Deal:
    """Rows 0 to ``tokens`` - 1, each of one rank, which keeps its own in ascending order.

    Everything follows from whole numbers that all ranks know, so that ranks agree. Made once per length: its index tensors
    stay on the devices that asked for them.

    Args:
        rows: int64, the rows of each rank, ascending; every row once.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.counts = tuple(len(own) for own in rows)
        self.tokens, self.most = sum(self.counts), max(self.counts)
        self._rows = tuple(rows)
        self._places: dict[torch.device, Tensor] = {}

    @classmethod
    def zigzag(cls, tokens: int, world: int) -> Deal:
        """Of 2 · world stretches rank r has the r-th from either end: under causal windows its rows see as many keys."""
        _check(tokens, world)
        row = torch.arange(tokens)
        stretch = [row[tokens * n // (2 * world) : tokens * (n + 1) // (2 * world)] for n in range(2 * world)]
        return cls([torch.cat([stretch[rank], stretch[-1 - rank]]) for rank in range(world)])

    @classmethod
    def interleaved(cls, tokens: int, world: int, block: int = 1) -> Deal:
        """Blocks of consecutive rows are dealt out to the ranks in turn."""
        _check(tokens, world, block)
        row = torch.arange(tokens)
        return cls([row[row // block % world == rank] for rank in range(world)])

    @classmethod
    def by_keys(cls, keys: Sequence[int], world: int, block: int = 64) -> Deal:
        """Blocks of consecutive rows, those that see the most keys first, each to the rank with the least so far.

        For windows that are not one causal triangle: several sequences, sliding windows. No two ranks differ by more than a
        block's keys and rows (a row costs as one key more than it sees).
        """
        _check(len(keys), world, block)
        work = [sum(keys[first : first + block]) + len(keys[first : first + block]) for first in range(0, len(keys), block)]
        least = [(0, rank) for rank in range(world)]
        owner = torch.empty(len(work), dtype=torch.int64)
        for each in sorted(range(len(work)), key=lambda number: (-work[number], number)):
            done, rank = least[0]
            owner[each] = rank
            heapq.heapreplace(least, (done + work[each], rank))
        owners = owner.repeat_interleave(block)[: len(keys)]
        return cls([(owners == rank).nonzero()[:, 0] for rank in range(world)])

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.counts)

    def rows(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [counts[rank]]: the rank's rows, ascending; under causal windows their ends are these and one."""
        return self._rows[rank].to(device)

    def own(self, whole: Tensor, rank: int) -> Tensor:
        """The rank's part of a tensor of all rows [tokens, ...]."""
        if len(whole) != self.tokens:
            raise InputError("whole", f"{len(whole)} rows", f"{self.tokens}, as are dealt out")
        return whole.index_select(0, self.rows(rank, whole.device))

    def places(self, device: torch.device) -> Tensor:
        """int64 [tokens]: where each row lies among the parts of all ranks, each padded to ``most`` rows."""
        if device not in self._places:
            places = torch.empty(self.tokens, dtype=torch.int64)
            for rank, own in enumerate(self._rows):
                places[own] = rank * self.most + torch.arange(len(own))
            self._places[device] = places.to(device)
        return self._places[device]


def _check(tokens: int, world: int, block: int = 1) -> None:
    for name, value, lowest in (("tokens", tokens, 0), ("world", world, 1), ("block", block, 1)):
        if value < lowest:
            raise SpecError(name, value, f"{lowest} or more")
