"""Choices of several ranks, joined: exactly the choice that one rank with all the scores makes, ties and NaN included."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functions
from ..errors import InputError
from ..ops.candidates import NO_TOKEN
from ..ops.select import SelectSpec
from ..problem import checks


def merge_choices(
    scores: Tensor,
    tokens: Tensor,
    topk: int,
    *,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
) -> Tensor:
    """The topk highest of all candidates, by ``select``'s rule: ties go to the lowest token, NaN comes after -inf.

    It is the choice from all scores where each rank's candidates are its own topk highest (or all it has), chosen without
    ``keep_first`` and ``keep_recent``: the tokens that these keep are known without a score, and need be no candidates.

    Args:
        scores: fp32 [rows, n], of the candidates of all ranks, in any order.
        tokens: int32 [rows, n], their tokens in the sequence, each at most once in a row; -1 is no candidate.
        topk: 1 to 4096.
        starts, ends: int32 [rows], the windows in the sequence; read only where tokens are kept. starts are 0 where absent.
        keep_first, keep_recent: as in ``select``.

    Returns:
        int32 [rows, topk], ascending, -1 behind the last.
    """
    spec = SelectSpec(topk, keep_first=keep_first, keep_recent=keep_recent)
    tokens = checks.tensor("tokens", tokens, (None, None), torch.int32)
    scores = checks.tensor("scores", scores, tuple(tokens.shape), torch.float32, like=tokens)
    rank = _rank(scores).masked_fill(tokens < 0, -torch.inf)
    if keep_first or keep_recent:
        rank, tokens = _keep(rank, tokens, _windows(tokens, starts, ends), spec)
    token, order = tokens.masked_fill(rank.isneginf(), NO_TOKEN).sort(dim=1)
    _, place = rank.gather(1, order).sort(dim=1, descending=True, stable=True)
    chosen = token.gather(1, place)[:, :topk].sort(dim=1).values
    chosen = torch.nn.functional.pad(chosen, (0, topk - chosen.shape[1]), value=NO_TOKEN)
    return chosen.masked_fill(chosen == NO_TOKEN, -1)


def merge_ascending(candidates: Tensor, topk: int) -> Tensor:
    """``merge_choices`` of lists that ascend, as ``select`` gives them, where no tokens are kept. Two launches.

    Lists are merged by the order of tokens, so that ``select`` itself chooses among the candidates, and takes the tokens for
    pages of one slot.

    Args:
        candidates: int32 [parts, rows, 2, n], of each part what ``functions.candidates_of`` gives.

    Returns:
        int32 [rows, topk], ascending, -1 behind the last.
    """
    ranked, tokens, ends = functions.merge_candidates(candidates)
    return functions.select(ranked, ends, topk, page_table=tokens, page=1)


def _rank(scores: Tensor) -> Tensor:
    """fp64 numbers in the order of choice: infinities come before -inf, which is left for no candidate; -0.0 becomes 0.0."""
    return scores.double().nan_to_num(nan=-1e300, posinf=1e299, neginf=-1e299) + 0.0


def _windows(tokens: Tensor, starts: Tensor | None, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 [rows, 1] each."""
    if ends is None:
        raise InputError("ends", "None", "the windows' ends, where tokens are kept")
    ends = checks.tensor("ends", ends, (len(tokens),), torch.int32, like=tokens)
    starts = torch.zeros_like(ends) if starts is None else starts
    starts = checks.tensor("starts", starts, (len(tokens),), torch.int32, like=tokens)
    return starts.long().clamp(min=0)[:, None], ends.long()[:, None]


def _keep(rank: Tensor, tokens: Tensor, window: tuple[Tensor, Tensor], spec: SelectSpec) -> tuple[Tensor, Tensor]:
    """Add the tokens that are always chosen, ahead of all others, and take them out of the candidates."""
    start, end = window
    first = start + torch.arange(spec.keep_first, device=rank.device)
    recent = end - spec.keep_recent + torch.arange(spec.keep_recent, device=rank.device)
    kept = torch.cat([first.masked_fill(first >= end, -1), recent.masked_fill(recent < start + spec.keep_first, -1)], dim=1)
    listed = (tokens < start + spec.keep_first) | (tokens >= end - spec.keep_recent)
    ahead = torch.full_like(kept, 1e300, dtype=torch.float64).masked_fill(kept < 0, -torch.inf)
    return torch.cat([rank.masked_fill(listed, -torch.inf), ahead], dim=1), torch.cat([tokens, kept.int()], dim=1)
