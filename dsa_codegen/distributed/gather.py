"""Collectives that the wing needs, over the caller's process group; they block as torch's do, on the current stream."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .deal import Deal

_ALIGNMENT = 16  # bytes; kernels want the parts of a packed message on such addresses
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def place(group: Any) -> tuple[int, int]:
    """(this process's rank in the group, the group's size); ``None`` is the default group.

    Raises:
        InputError: there is no default group yet, or the process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("group", "no process group", "one; call torch.distributed.init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("group", "one that this process is not in", "a group of its own")
    return rank, dist.get_world_size(group)


def gathered(local: Tensor, group: Any) -> Tensor:
    """[world, *local.shape]: every rank's tensor, which have one shape, in the order of ranks."""
    return gathered_together([local], group)[0]


def gathered_together(local: Sequence[Tensor], group: Any) -> list[Tensor]:
    """``gathered`` of several tensors in one collective; more than one are packed, and are strided over ranks."""
    everyone, _ = _start(_packed(local), group, wait=True)
    return _unpacked(everyone, local)


def exchanged(local: Sequence[Tensor], group: Any) -> list[Tensor]:
    """[world, *shape[1:]] of tensors [world, ...]: what every rank has for this one, in the order of ranks; one collective."""
    shapes = [each[0] for each in local]
    if len(local) == 1 and local[0].is_contiguous():
        sent = local[0].flatten(1).view(torch.uint8) if local[0].numel() else local[0].new_empty(len(local[0]), 0).byte()
        return _unpacked(_exchange(sent, group), shapes)
    sent = torch.empty(len(local[0]), sum(map(_size, shapes)), dtype=torch.uint8, device=local[0].device)
    for into, each in zip(_unpacked(sent, shapes), local, strict=True):
        _widest(into).copy_(_widest(each))  # straight into the message, whatever its strides
    return _unpacked(_exchange(sent, group), shapes)


def gathered_rows(local: Tensor, counts: Sequence[int], group: Any) -> Tensor:
    """[sum of counts, ...]: every rank's rows one behind the other, where rank r has counts[r] of them."""
    if min(counts) == max(counts):
        return gathered(local, group).flatten(0, 1)
    row = local.shape[1:]
    width = row.numel() * local.element_size()
    if width and min(counts) and dist.get_backend(group) == "nccl":  # which has a collective of parts of any size
        come = _gather_parts(_packed([local]), [count * width for count in counts], group)
        return come.view(local.dtype).view(-1, *row)
    parts = gathered(_padded(local, max(counts)), group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def counts_of(bounds: Sequence[int]) -> list[int]:
    """How many rows each rank has whose rows are consecutive."""
    return [end - start for start, end in itertools.pairwise(bounds)]


class Gathering:
    """Rows of several tensors on their way to every rank, while the current stream computes something else."""

    def __init__(self, local: Sequence[Tensor], deal: Deal, group: Any) -> None:
        self._deal = deal
        self._padded = [_padded(each, deal.most) for each in local]
        self._sent = _packed(self._padded)  # kept until they have arrived
        self._everyone, self._work = _start(self._sent, group, wait=False)

    def wait(self) -> list[Tensor]:
        """Each tensor of all rows, in the sequence's order; what the current stream does next waits for them."""
        if self._work is not None:
            self._work.wait()
        return [self._in_order(part) for part in _unpacked(self._everyone, self._padded)]

    def _in_order(self, part: Tensor) -> Tensor:
        shape, places = part.shape[2:], self._deal.places(part.device)
        if part.shape[0] == 1:
            return part[0].contiguous()
        width = part[0, 0].numel() * part.element_size() if part.numel() else 0
        if not width:
            return part.new_empty(self._deal.tokens, *shape)
        # In the widest words that a row is whole of, as torch copies them one by one.
        rows = part.reshape(*part.shape[:2], -1).view(_WORDS[_word(width)])
        taken = rows[places // self._deal.most, places % self._deal.most]
        return taken.view(part.dtype).view(self._deal.tokens, *shape)


def gather_rows(local: Sequence[Tensor], deal: Deal, group: Any = None) -> Gathering:
    """Start to gather rows that are dealt out; ``.wait()`` gives them whole. Gatherings arrive in the order of their start.

    Args:
        local: the rank's rows of each tensor, [deal.counts[rank], ...] in the deal's order; one collective for all of them.
        deal: the same on every rank.
        group: a process group; torch's default group where absent.

    Raises:
        InputError: other rows than the rank has by the deal, or a group of another size.
    """
    rank, world = place(group)
    if world != deal.world:
        raise InputError("deal", f"one for {deal.world} ranks", f"one for {world}, as the group has")
    for each in local:
        if len(each) != deal.counts[rank]:
            raise InputError("local", f"{len(each)} rows", f"{deal.counts[rank]}, which rank {rank} has by the deal")
    return Gathering(local, deal, group)


def _start(sent: Tensor, group: Any, wait: bool) -> tuple[Tensor, Any]:
    """(bytes [world, n] of every rank, what to wait for)."""
    everyone = sent.new_empty(place(group)[1], len(sent))
    if not len(sent):
        return everyone, None
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # newer torch warns of the older name
    return everyone, gather(everyone.view(-1), sent, group=group, async_op=not wait)


def _exchange(sent: Tensor, group: Any) -> Tensor:
    """Bytes [world, n]: row r goes to rank r, and its row for this rank comes."""
    come = torch.empty_like(sent)
    if sent.numel():
        dist.all_to_all_single(come, sent, group=group)
    return come


def _gather_parts(sent: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """Bytes of every rank one behind the other, of each as many as ``sizes`` says."""
    come = sent.new_empty(sum(sizes))
    dist.all_gather(list(come.split(list(sizes))), sent, group=group)
    return come


def _padded(local: Tensor, rows: int) -> Tensor:
    """The rows, and more of them up to the number that every rank sends."""
    if len(local) == rows:
        return local
    return torch.cat([local, local.new_empty(rows - len(local), *local.shape[1:])])


def _packed(local: Sequence[Tensor]) -> Tensor:
    """As bytes, one behind the other: not every transport knows every dtype."""
    parts = [each.contiguous().view(-1).view(torch.uint8) for each in local]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([_aligned(part) for part in parts])


def _aligned(part: Tensor) -> Tensor:
    """The bytes, and as many more as the next part begins on an aligned address."""
    more = -part.shape[-1] % _ALIGNMENT
    return torch.nn.functional.pad(part, (0, more)) if more else part


def _unpacked(everyone: Tensor, local: Sequence[Tensor]) -> list[Tensor]:
    """[world, *shape] of each tensor; views."""
    found, first = [], 0
    for each in local:
        size = each.numel() * each.element_size()
        part = everyone[:, first : first + size].view(each.dtype) if size else each.new_empty(len(everyone), 0)
        found.append(part.view(len(everyone), *each.shape))
        first += _size(each)
    return found


def _size(each: Tensor) -> int:
    """Bytes in a packed message, aligned."""
    size = each.numel() * each.element_size()
    return size + -size % _ALIGNMENT


def _word(*widths: int) -> int:
    """The widest of which all these bytes are whole."""
    return next(word for word in _WORDS if all(width % word == 0 for width in widths))


def _widest(each: Tensor) -> Tensor:
    """The same bytes in the widest words, as torch copies what is strided word by word (8 MB in halves: 10 µs)."""
    size = each.element_size()
    if not each.numel() or each.stride(-1) != 1:
        return each
    word = _word(*(size * int(apart) for apart in (each.shape[-1], each.storage_offset(), *each.stride()[:-1])))
    return each.view(_WORDS[word]) if word > size else each
