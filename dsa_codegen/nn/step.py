"""Step: what the tokens of one step have in common for all layers, made once and read by each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..choice import slots_of
from ..distributed import Deal


class Shared(NamedTuple):
    """How ranks share a step over caches that are sharded by position.

    In prefill each rank has the rows of the tokens that its caches hold; in decode all ranks have all rows.
    """

    rows: Tensor | None = None
    """int64 [tokens]: which of the whole step's tokens this rank has; None where that is all."""
    dealt: Deal | None = None
    """The step's tokens among the ranks: ``gather_rows([out], dealt).wait()`` puts results in the order of the step."""
    context: Deal | None = None
    """The tokens of the step's context among the ranks."""


class Step(NamedTuple):
    """New tokens of some sequences: where they stand, where they are stored, what they see.

    Tokens of all sequences lie one behind the other. ``context`` None is a step over the paged caches as they are (decode),
    whose choices are slots; otherwise choices are places in ``context``.
    """

    cos_sin: Tensor
    """fp32 [positions, d_rope], see ``rotary_table``."""
    positions: Tensor
    """int64 [tokens]."""
    slots: Tensor
    """int64 [tokens], -1 where nothing is stored."""
    page_table: Tensor
    """int32 [sequences, max_pages]."""
    lengths: Tensor
    """int32 [sequences, next_n] in decode, int32 [tokens] in prefill: tokens that each query sees."""
    max_context: int
    """At least the longest length; fixed while a CUDA graph is in use."""
    context: Tensor | None = None
    """int64 [keys]: the slots of all tokens of all sequences of the step (those that this rank holds, where ranks share it)."""
    starts: Tensor | None = None
    """int32 [tokens]: where each query's window begins in ``context``."""
    ends: Tensor | None = None
    chosen: Tensor | None = None
    """int32 [tokens, topk]: the whole windows, where none is longer than topk; then nothing is scored or selected."""
    bounds: Sequence[int] | None = None
    """The rows that each rank scores where a group shares the work; see ``distributed.balanced_bounds``."""
    shared: Shared | None = None
    """Where caches are sharded by position: whose tokens these are. All else is then the rank's, but for what is seen."""


def whole_windows(starts: Tensor, ends: Tensor, topk: int) -> Tensor:
    """int32 [rows, topk]: every token of windows [start, end) that are no longer than topk, -1 behind the last."""
    token = starts[:, None] + torch.arange(topk, dtype=torch.int32, device=starts.device)
    return torch.where(token < ends[:, None], token, -1)


def whole_slots(lengths: Tensor, page_table: Tensor, page: int, topk: int) -> Tensor:
    """The same as slots of paged caches, of windows from token 0; lengths int32 [sequences, next_n]."""
    ends = lengths.flatten()
    tokens = whole_windows(torch.zeros_like(ends), ends, topk)
    reachable = tokens < page_table.shape[1] * page
    return slots_of(torch.where(reachable, tokens, -1), page_table, page)
