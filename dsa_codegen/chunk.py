"""From one chunk of logits to the choice of its rows: all that the spec allows, or as many as a rule finds worth it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functions
from .adaptive import Adaptive
from .ops.select import SelectSpec


class Chunk(NamedTuple):
    """Logits of some rows, the rows' windows, and the page table where slots are wanted."""

    logits: Tensor
    ends: Tensor
    starts: Tensor | None
    table: Tensor | None

    def within(self, page: int) -> Chunk:
        """The same, with windows that end where the table does: tokens are looked at before they become slots."""
        return self if self.table is None else self._replace(ends=self.ends.clamp(max=self.table.shape[1] * page))


class Wanted(NamedTuple):
    """Where what comes of a choice is written, each of it where it is wanted."""

    out: Tensor | None
    scores: Tensor | None
    lengths: Tensor | None


def taken(chunk: Chunk, rule: SelectSpec, adaptive: Adaptive | None, wanted: Wanted, sms: int | None) -> Tensor:
    """Select from a chunk.

    Args:
        rule: how many, what is kept, and the page.
        adaptive: a rule of these rows.

    Returns:
        int32 [rows, topk], tokens or slots: ``wanted.out`` where that is given.
    """
    select = functools.partial(functions.select, keep_first=rule.keep_first, keep_recent=rule.keep_recent, sms=sms)
    if adaptive is not None:
        return _adapted(chunk.within(rule.page), rule, adaptive, wanted, select)
    if wanted.scores is not None:
        return _scored(chunk.within(rule.page), rule, wanted, select)
    paging: dict[str, Any] = {"page_table": chunk.table, "page": rule.page}
    return select(chunk.logits, chunk.ends, rule.topk, starts=chunk.starts, out=wanted.out, **paging)


def _scored(chunk: Chunk, rule: SelectSpec, wanted: Wanted, select: functools.partial[Tensor]) -> Tensor:
    """Scores are read at the tokens, which then become slots."""
    tokens = select(chunk.logits, chunk.ends, rule.topk, starts=chunk.starts)
    assert wanted.scores is not None
    wanted.scores.copy_(_scores_at(chunk.logits, tokens))
    chosen = tokens if chunk.table is None else slots_of(tokens, chunk.table, rule.page)
    return chosen if wanted.out is None else wanted.out.copy_(chosen)


def _adapted(chunk: Chunk, rule: SelectSpec, adaptive: Adaptive, wanted: Wanted, select: functools.partial[Tensor]) -> Tensor:
    """As many of the tokens as they are worth."""
    logits, ends, starts, table = chunk
    tokens = select(logits, ends, rule.topk, starts=starts)
    options: dict[str, Any] = {"keep_first": rule.keep_first, "keep_recent": rule.keep_recent, **adaptive.options()}
    paging: dict[str, Any] = {"page_table": table, "page": rule.page}
    chosen, lengths, scores = functions.adapt(logits, tokens, ends, starts=starts, **paging, **options, chosen_scores=True)
    assert wanted.lengths is not None  # a rule needs them
    wanted.lengths.copy_(lengths)
    if wanted.scores is not None:
        wanted.scores.copy_(scores)
    return chosen if wanted.out is None else wanted.out.copy_(chosen)


def slots_of(tokens: Tensor, page_table: Tensor, page: int) -> Tensor:
    """The slots that hold tokens of paged caches: block · page + offset, as ``select`` gives them.

    Args:
        tokens: int32 [rows, n], token numbers below max_pages · page; -1 is no token.
        page_table: int32 [requests, max_pages]; rows / requests consecutive rows share a request.
        page: tokens per page.

    Returns:
        int32 [rows, n], -1 for no token and where the table's page is negative.
    """
    if not tokens.numel() or not page_table.shape[1]:
        return torch.full_like(tokens, -1)
    token = tokens.view(len(page_table), -1)
    block = page_table.gather(1, token.clamp(min=0).long() // page)
    return torch.where((token < 0) | (block < 0), -1, block * page + token % page).view(tokens.shape)


def _scores_at(logits: Tensor, tokens: Tensor) -> Tensor:
    """fp32 [rows, topk]: the logits at the tokens, -inf where there is none."""
    if not logits.shape[1]:
        return torch.full_like(tokens, -torch.inf, dtype=torch.float32)
    return logits.gather(1, tokens.clamp(min=0).long()).float().masked_fill(tokens < 0, -torch.inf)
