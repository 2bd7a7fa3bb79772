"""Which tokens of a sequence a rank's cache holds: from its own token numbers to the sequence's, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, SpecError

_MOST = 2**31 - 1  # token numbers are int32


@dataclass(frozen=True)
class Shard:
    """The rank's token ``t`` is the sequence's ``offset + (t // block) · stride + t % block``."""

    offset: int
    stride: int = 1
    block: int = 1
    tokens: int = _MOST
    """The most that the rank holds; the next rank's begin behind them where sequences are cut into stretches."""

    def __post_init__(self) -> None:
        for name, lowest in (("offset", 0), ("block", 1), ("stride", self.block), ("tokens", 0)):
            if not lowest <= getattr(self, name) <= _MOST:
                raise SpecError(f"Shard.{name}", getattr(self, name), f"{lowest} to {_MOST}")

    @classmethod
    def interleaved(cls, rank: int, world: int, block: int = 1) -> Shard:
        """Blocks of consecutive tokens are dealt out to the ranks in turn."""
        if not 0 <= rank < world:
            raise SpecError("rank", rank, f"0 to {world - 1}, as world = {world}")
        return cls(rank * block, world * block, block)

    @classmethod
    def stretch(cls, first: int, tokens: int) -> Shard:
        """``tokens`` consecutive ones, beginning with the sequence's token ``first``."""
        return cls(first, tokens=tokens)

    def to_global(self, tokens: Tensor, none: int = -1) -> Tensor:
        """Token numbers of the sequence, int32 of the same shape; ``none`` in place of what is below 0."""
        # Few launches: a step of decode calls this on the GPU, each of them takes 3 µs there.
        tokens = tokens.int()
        place = tokens if self.stride == self.block else tokens.add(tokens // self.block, alpha=self.stride - self.block)
        return (place + self.offset).masked_fill_(tokens < 0, none)

    def to_local(self, tokens: Tensor) -> Tensor:
        """The rank's token numbers, int32 of the same shape; -1 for tokens of other ranks, and for none."""
        place = tokens.long() - self.offset
        local = place // self.stride * self.block + place % self.stride
        absent = (tokens < 0) | (place < 0) | (place % self.stride >= self.block) | (local >= self.tokens)
        return local.masked_fill(absent, -1).int()

    def count(self, lengths: Tensor) -> Tensor:
        """How many of the first ``lengths`` tokens the rank holds, int32: a window [start, end) is there [count, count)."""
        place = (lengths - self.offset).clamp_(min=0)
        if self.stride > self.block:
            whole = place // self.stride
            place = torch.sub(place, whole, alpha=self.stride).clamp_(max=self.block).add_(whole, alpha=self.block)
        return (place if self.tokens == _MOST else place.clamp_(max=self.tokens)).int()

    def number(self, length: int) -> int:
        """``count`` of one length that the host knows."""
        place = max(length - self.offset, 0)
        whole, rest = divmod(place, self.stride)
        return min(whole * self.block + min(rest, self.block), self.tokens)

    def counted(self, lengths: Tensor, most: int) -> Tensor:
        """``count``, and no more than ``most``: lengths are looked up among the rank's tokens, in one launch instead of seven.

        Their list is made at the first call, and stays, as CUDA graphs read it: where that call is captured itself, or there
        are many lists already, lengths are counted.
        """
        most, key = min(most, self.tokens), (self, most, lengths.device)
        if key not in _HELD:
            capturing = lengths.is_cuda and torch.cuda.is_current_stream_capturing()
            if capturing or len(_HELD) >= _MOST_LISTS:
                return self.count(lengths).clamp_(max=most)
            _HELD[key] = self.to_global(torch.arange(most, dtype=torch.int32, device=lengths.device))
        return torch.searchsorted(_HELD[key], lengths, out_int32=True)


_HELD: dict[tuple[Shard, int, torch.device], Tensor] = {}
_MOST_LISTS = 64


def checked(shard: object) -> Shard:
    """The shard.

    Raises:
        InputError: it is none.
    """
    if not isinstance(shard, Shard):
        raise InputError("shard", repr(shard), "a Shard: Shard.interleaved(rank, world, block), or Shard.stretch(first, n)")
    return shard


def localise(chosen: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """What a rank has of a choice: its own tokens in front, in the order of the choice, and how many they are.

    Args:
        chosen: int32 [..., n], tokens of the sequence, -1 anywhere for none.
        shard: the rank's.

    Returns:
        int32 [..., n], the rank's token numbers, -1 behind them; int32 [...], the counts.
    """
    local = checked(shard).to_local(chosen)
    own = local >= 0
    count = own.cumsum(-1)
    # The others go to a column that is cut off; nothing is sorted.
    place = torch.where(own, count - 1, local.shape[-1])
    front = local.new_full((*local.shape[:-1], local.shape[-1] + 1), -1).scatter_(-1, place, local)
    return front[..., :-1].contiguous(), own.sum(-1, dtype=torch.int32)
