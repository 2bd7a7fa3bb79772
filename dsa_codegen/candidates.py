"""Choices within candidate blocks: only listed blocks of tokens are scored, as where another layer has chosen them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functions
from .choice import LOGITS_BYTES, index_select_paged, slots_of
from .errors import InputError
from .problem import checks
from .problem.caches import valid_slots
from .problem.paged import check_keys

_ALIGNED_ROWS = 4  # kernels read lengths of 4 bytes that lie on 16-byte addresses
_NONE = 1 << 30  # in place of a number that is no candidate: sorts behind all others


def index_select_candidates(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    candidates: Tensor,
    topk: int,
    *,
    block: int | None = None,
    score: str = "weighted_relu",
    logits: str = "fp32",
    slots: bool = True,
    max_bytes: int = LOGITS_BYTES,
    scores: str = "fp8",
    sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """The topk tokens of each query's candidate blocks that its indexer scores highest; no other token is scored or chosen.

    The second level of DeepSeek-V4.1's indexer, which chooses 512 tokens of 2048 blocks of 8 that an earlier layer found. It is
    ``index_select_paged`` over a table of the listed blocks, where these are whole pages. The keys of smaller blocks are
    copied into pages of their own first, head_dim + 4 bytes a token. May be captured in a CUDA graph.

    Args:
        q, cache, weights, lengths, page_table: as in ``indexer_logits_paged``.
        candidates: int32 [batch, next_n, blocks], numbers of blocks within the sequence: block i holds the tokens i · block to
            (i + 1) · block - 1. In any order; one that is negative, begins at or behind the query's length, lies on a page that
            is absent or was listed before is not looked at, and the last may end behind the length.
        topk: as in ``select``.
        block: tokens of a block, a divisor of the cache's page; the page where absent.
        slots: physical slots of the cache's pages; False gives token numbers.
        max_bytes: of logits in memory at once, and of copied keys; or what 4 queries take where that is more.
        score, logits, scores, sms, batch_invariant: as in ``index_select_paged``.

    Returns:
        int32 [batch, next_n, topk] in ascending token order, -1 behind the last; ties go to the lowest token.

    Raises:
        InputError, SpecError: before anything is launched.
    """
    block = _checked(q, cache, lengths, page_table, candidates, block, scores)
    checks.check_kind("max_bytes", max_bytes, "int")
    checks.check_kind("slots", slots, "bool")
    (batch, next_n), listed = lengths.shape, candidates.shape[2]
    weights = checks.rows("weights", weights, (batch * next_n, q.shape[2]), torch.float32, like=q)
    if not listed or not page_table.shape[1] or not len(cache):
        listed = 0  # nothing to look at; the call below still judges the other arguments
        candidates, page_table = candidates[..., :0], page_table[:, :0]
    numbers, places, seen = _in_order(candidates, lengths, page_table, cache, block)
    rows, page = batch * next_n, cache.shape[1]
    bytes_of_row = listed * block * cache.shape[3] * cache.element_size()
    fitting = max_bytes // max(bytes_of_row, 1) // _ALIGNED_ROWS * _ALIGNED_ROWS
    copied = rows if block == page else max(_ALIGNED_ROWS, fitting)
    found = []
    for first in range(0, max(rows, 1), copied):
        own = slice(first, min(first + copied, rows))
        pages = (cache, places[own]) if block == page else _copied(cache, places[own], block)
        options: dict[str, Any] = {"score": score, "logits": logits, "scores": scores, "sms": sms}
        options |= {"batch_invariant": batch_invariant, "max_bytes": max_bytes}
        given = q.flatten(0, 1)[own, None], pages[0], weights[own], seen[own, None], pages[1], listed * block, topk
        found.append(index_select_paged(*given, slots=False, **options)[:, 0])
    return slots_of(torch.cat(found), places if slots else numbers, block).view(batch, next_n, topk)


def _checked(
    q: Tensor, cache: Tensor, lengths: Tensor, page_table: Tensor, candidates: Tensor, block: int | None, scores: str
) -> int:
    """The tokens of a block."""
    checked, page = check_keys(q, cache, scores)
    batch, next_n = checked.shape[:2]
    checks.tensor("lengths", lengths, (batch, next_n), torch.int32, like=q)
    checks.tensor("page_table", page_table, (batch, None), torch.int32, like=q, inner_contiguous=True)
    checks.tensor("candidates", candidates, (batch, next_n, None), torch.int32, like=q)
    if block is None:
        return page
    checks.check_kind("block", block, "int")
    if block < 1 or page % block:
        raise InputError("block", block, f"a divisor of the cache's page, {page}")
    return block


def _in_order(
    candidates: Tensor, lengths: Tensor, page_table: Tensor, cache: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is looked at of each query's list, in ascending order without repeats.

    Returns:
        int32 [rows, blocks]: their numbers, -1 behind them; where they lie in the cache, in blocks; and int32 [rows], how many
        tokens of them a query sees.
    """
    number, length = candidates.flatten(0, 1).long(), lengths.flatten()[:, None]
    table = page_table.repeat_interleave(lengths.shape[1], dim=0)
    shares = cache.shape[1] // block  # blocks of a page

    def page_of(number: Tensor) -> Tensor:
        return table.gather(1, (number // shares).clamp(0, max(table.shape[1] - 1, 0)))

    there = (number >= 0) & (number * block < length) & (number // shares < table.shape[1])
    there &= valid_slots(page_of(number), len(cache))
    number = number.masked_fill(~there, _NONE).sort(1).values
    again = torch.zeros_like(there)
    again[:, 1:] = number[:, 1:] == number[:, :-1]
    number = number.masked_fill(again, _NONE).sort(1).values
    none = number == _NONE
    place = (page_of(number).long() * shares + number % shares).masked_fill(none, -1)
    seen = (length - number * block).clamp(0, block).masked_fill(none, 0).sum(1)
    return number.masked_fill(none, -1).int(), place.int(), seen.int()


def _copied(cache: Tensor, places: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A cache that holds the keys of these blocks of each row one behind the other, and its page table."""
    (rows, listed), page, device = places.shape, cache.shape[1], cache.device
    pages = -(-listed * block // page)
    slots = places[:, :, None] * block + torch.arange(block, device=device, dtype=torch.int32)
    slots = slots.masked_fill(places[:, :, None] < 0, -1).flatten(1)
    slots = torch.nn.functional.pad(slots, (0, pages * page - slots.shape[1]), value=-1).flatten()
    table = torch.arange(rows * pages, device=device, dtype=torch.int32).view(rows, pages)
    if cache.dtype != torch.uint8:
        at = slots.clamp(min=0).long()
        return cache[at // page, at % page, 0].view(rows * pages, page, 1, cache.shape[3]), table
    keys, scales = functions.gather_index_k(cache, slots)
    width = keys.shape[1]
    made = cache.new_empty(rows * pages, page * (width + 4))
    made[:, : page * width] = keys.view(torch.uint8).view(rows * pages, page * width)
    made[:, page * width :] = scales.view(torch.uint8).view(rows * pages, page * 4)
    return made.view(rows * pages, page, 1, width + 4), table
