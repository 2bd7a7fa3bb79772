"""Masks as windows: what a query may see is [start, end), two numbers instead of a row of the context's length.

transformers asks a registered function for the mask of every step and hands the result on untouched, whatever its last
dimension holds. A mask of 32K queries and tokens would be 1 GB; its windows are 256 KB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError

_CELLS = 1 << 26
"""Of a mask that is looked at as a whole, at once."""


def windows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **others: object,
) -> Tensor:
    """The windows that a mask states, int32 [batch, 1, queries, 2] (start, end), in the form of transformers' mask functions.

    Args:
        mask_function: (batch, head, query, token) -> may see; causal where absent.
        attention_mask: bool [batch, tokens], False at padding, on either side.

    Raises:
        InputError: a query sees tokens on both sides of some that it does not see, or the function is the user's own.
    """
    if use_vmap:
        raise InputError("attention_mask", "a mask function of the model's user", "causal, sliding, packed or padded masks")
    seen = None if attention_mask is None else _padded(attention_mask, kv_offset, kv_length)
    queries = torch.arange(q_length, device=device) + q_offset
    if getattr(mask_function, "__name__", "causal_mask_function") == "causal_mask_function":
        return _causal(queries - kv_offset + 1, batch_size, kv_length, seen)
    step = max(1, _CELLS // max(batch_size * kv_length, 1))
    parts = [_whole(part, batch_size, kv_length, kv_offset, mask_function, seen) for part in queries.split(step)]
    return torch.cat(parts, dim=2)


def _padded(attention_mask: Tensor, offset: int, length: int) -> Tensor:
    """The mask's columns of the tokens that keys hold; of those behind its end, which a static cache has, nobody sees any."""
    missing = offset + length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, offset : offset + length].bool()


def _causal(ends: Tensor, batch: int, tokens: int, seen: Tensor | None) -> Tensor:
    """Windows up to each query, between the paddings."""
    first = torch.zeros(batch, 1, dtype=torch.int32, device=ends.device)
    last = first + tokens
    if seen is not None:
        first, last = _bounds(seen[:, None], ends.shape[0] > 1 or not seen.is_cuda)
    end = torch.minimum(ends[None].int(), last)
    return torch.stack((torch.minimum(first.expand_as(end), end), end), dim=-1)[:, None].int()


def _whole(
    queries: Tensor, batch: int, tokens: int, offset: int, mask_function: Callable[..., Any] | None, seen: Tensor | None
) -> Tensor:
    """Windows of a mask that only its function knows: cell by cell, for some of the queries."""
    assert mask_function is not None
    rows = torch.arange(batch, device=queries.device)[:, None, None, None]
    columns = torch.arange(tokens, device=queries.device) + offset
    cells = mask_function(rows, torch.zeros_like(rows), queries[None, None, :, None], columns[None, None, None])
    cells = cells.expand(batch, 1, len(queries), tokens)
    if seen is not None:
        cells = cells & seen[:, None, None]
    return torch.stack(_bounds(cells, True), dim=-1)


def _bounds(cells: Tensor, checked: bool) -> tuple[Tensor, Tensor]:
    """(first, last + 1) of the True cells of each row [..., tokens], int32 [...]; both 0 where there is none.

    Whether they have holes is asked of the GPU, so neither in a trace nor in a capture, nor at every token of decoding.
    """
    tokens, counted = cells.shape[-1], cells.sum(-1, dtype=torch.int32)
    first = cells.int().argmax(-1).int()
    last = torch.where(counted > 0, tokens - cells.flip(-1).int().argmax(-1).int(), 0)
    traced = torch.compiler.is_compiling() or (cells.is_cuda and torch.cuda.is_current_stream_capturing())
    if checked and not traced and bool((counted != last - first).any()):
        raise InputError("attention_mask", "a row with a hole", "one run of visible tokens for every query")
    return first, last
