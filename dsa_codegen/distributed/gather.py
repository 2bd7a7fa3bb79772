"""Collectives that the wing needs, over the caller's process group; they block as torch's do, on the current stream."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError


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
    world = place(group)[1]
    everyone = local.new_empty(world, *local.shape)
    if local.numel():
        # As bytes: not every transport knows every dtype.
        sent = local.contiguous().view(-1).view(torch.uint8)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # newer torch warns of the older name
        gather(everyone.view(-1).view(torch.uint8), sent, group=group)
    return everyone


def gathered_rows(local: Tensor, bounds: list[int], group: Any) -> Tensor:
    """[rows, n]: every rank's rows one behind the other, where rank r has those from bounds[r] to bounds[r + 1]."""
    counts = [end - start for start, end in itertools.pairwise(bounds)]
    padded = local.new_full((max(counts), local.shape[1]), -1)  # collectives want one shape
    padded[: len(local)] = local
    return torch.cat([part[:count] for part, count in zip(gathered(padded, group), counts, strict=True)])
