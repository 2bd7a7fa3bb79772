"""Which tokens of a prefill step, and of what it sees, a rank holds: on the host, from what all ranks know."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import Deal, Shard


class Part(NamedTuple):
    """A sequence's tokens of a prefill step, from ``begin`` on; it sees those from 0 on."""

    sequence: int
    begin: int
    end: int


class Own(NamedTuple):
    """What a rank has of a step; the context is all tokens of the step's sequences, one sequence behind the other."""

    rows: Tensor
    """int64 [tokens]: which of the step's tokens are the rank's."""
    positions: Tensor
    """int64 [tokens]: where they stand in their sequences."""
    starts: Tensor
    """int64 [tokens]: where their sequences begin in the context."""
    place: Tensor
    """int64 [tokens]: which of the rank's tokens of the context they are."""
    owners: Tensor
    """int64 [step's tokens]: the rank of each."""
    context: Tensor
    """int64 [context]: the rank of each of its tokens."""


def own(parts: Sequence[Part], shard: Shard) -> Own:
    """The rank's tokens of a step: those that its caches hold (``Shard.interleaved``)."""
    context = _joined(torch.arange(part.end) // shard.block % (shard.stride // shard.block) for part in parts)
    firsts = itertools.accumulate((part.end for part in parts), initial=0)
    positions = _joined(torch.arange(part.begin, part.end) for part in parts)
    starts = _joined(torch.full((part.end - part.begin,), first) for part, first in zip(parts, firsts, strict=False))
    seen, rank = starts + positions, shard.offset // shard.block
    owners = context[seen]
    rows = (owners == rank).nonzero()[:, 0]
    place = (context == rank).cumsum(0) - 1
    return Own(rows, positions[rows], starts[rows], place[seen[rows]], owners, context)


def dealt(owners: Tensor, ranks: int) -> Deal:
    """Tokens among the ranks."""
    return Deal([(owners == rank).nonzero()[:, 0] for rank in range(ranks)])


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """int64, also of none."""
    return torch.cat([*tensors, torch.empty(0, dtype=torch.int64)])
