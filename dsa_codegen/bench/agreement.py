"""Agreement: how a selection is judged by the scores it chose, whatever order or ties its author prefers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..problem import compare
from ..problem.op import Accuracy

PEER_SIMILARITY = 1e-4
"""What a peer may differ from the reference by: it rounds in its own ways, and is not this package's to judge finer."""


def selection(chosen: Tensor, scores: Tensor, topk: int, exact: bool) -> Accuracy:
    """Compare the scores of chosen tokens with the highest ones.

    Args:
        chosen: int [rows, topk], tokens; anything outside the columns means none.
        scores: fp32 [rows, columns], -inf outside a row's window.
        exact: the choice was made on these very scores; otherwise on others that are nearly the same.
    """
    columns = scores.shape[1]
    valid = (chosen >= 0) & (chosen < columns)
    ordered = torch.where(valid, chosen, columns).sort(dim=1).values
    twice = int(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < columns)).sum())
    if twice:
        return Accuracy(False, float(twice), math.inf, f"chosen: {twice} tokens chosen twice")
    got = scores.gather(1, torch.where(valid, chosen, 0).long()).masked_fill(~valid, -math.inf).sort(descending=True).values
    want = scores.topk(min(topk, columns), dim=1).values
    want = torch.nn.functional.pad(want, (0, topk - want.shape[1]), value=-math.inf)
    if exact:
        return compare.equal("scores of the chosen", got, want)
    return compare.close("scores of the chosen", got, want, compare.LOGITS)


def tokens_of_slots(slots: Tensor, page_table: Tensor, page: int) -> Tensor:
    """int64 like ``slots`` [rows, topk]: the tokens of the rows' requests that lie there, -1 where none does."""
    rows, requests = len(slots), len(page_table)
    pages = torch.arange(page_table.shape[1], device=slots.device).expand_as(page_table)
    blocks = int(page_table.max()) + 1 if page_table.numel() else 0
    place = torch.full((requests, blocks + 1), -1, dtype=torch.int64, device=slots.device)
    place.scatter_(1, page_table.clamp(min=0).long(), pages)
    place = place.repeat_interleave(rows // max(requests, 1), dim=0)
    known = (slots >= 0) & (slots < blocks * page)
    at = place.gather(1, torch.where(known, slots // page, blocks).long())
    return torch.where(at >= 0, at * page + slots % page, -1)
