"""The tokens that each query attends to: the model's own queries, keys and weights, our scores and our selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import choice, functions
from ...errors import InputError
from ...ops.logits import row_bytes
from . import families, learn
from .families import Family

_PAGE = 64


@dataclass(frozen=True)
class Rule:
    """How an enabled indexer chooses."""

    family: Family
    topk: int
    scores: str
    """"bf16": the model's own dtype, unquantised; "fp8": queries and keys quantised with a scale each."""
    lesson: learn.Lesson | None = None
    """How the model is trained, if it is."""


def forward(indexer: Any, rule: Rule, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
    """Stands in for an indexer's ``forward``: int32 [batch, queries, topk], ascending, -1 behind a short window's last token.

    Arguments are those of the models: ``q_resid`` (not of all), rotary cosines and sines, the mask, positions, the cache,
    which some versions call ``past_key_values`` and others ``cache``.
    """
    given = named_arguments(rule.family, args, named)
    made = None
    if rule.lesson is not None and rule.lesson.applies:
        made = rule.lesson.read(rule.family, indexer, hidden_states, given)
    with torch.no_grad():
        return _choice(indexer, rule, hidden_states, given, made)


def _choice(indexer: Any, rule: Rule, hidden_states: Tensor, given: dict[str, Any], made: tuple[Tensor, ...] | None) -> Tensor:
    """What ``forward`` gives; ``made`` are queries, keys and weights where they are known already."""
    cache = given.get("cache", given.get("past_key_values"))
    rotation, position = given["position_embeddings"], given.get("position_ids")
    keys = families.keys(rule.family, indexer, hidden_states, rotation) if made is None else made[1]
    if cache is not None:
        keys = cache.update_indexer(keys, indexer.layer_idx)
    window = _window(given["attention_mask"], hidden_states)
    if keys.shape[1] <= rule.topk:  # every window is taken whole: nothing to score, nothing to select
        return _everything(window, rule.topk)
    if rule.lesson is not None and rule.lesson.applies and rule.lesson.stage != "sparse":
        return _everything(window, 0)  # all tokens are attended to
    if made is not None:
        return _chosen(rule, made[0], keys, made[2], window)
    queries = families.queries(rule.family, indexer, hidden_states, given.get("q_resid"), rotation, position)
    return _chosen(rule, queries, keys, families.weights(indexer, hidden_states), window)


def named_arguments(family: Family, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an indexer's ``forward`` behind the hidden states, by name."""
    names = ("position_embeddings", "attention_mask", "position_ids", "cache")
    return dict(zip(names if family.of_hidden else ("q_resid", *names), args, strict=False)) | named


def _window(mask: object, hidden_states: Tensor) -> Tensor:
    """The windows int32 [batch, queries, 2] that ``windows`` made."""
    shape = (*hidden_states.shape[:2], 2)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.int32 or mask.shape[1:] != shape[1:]:
        came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError("attention_mask", came, "none, or one of two dimensions: a prepared mask of four is not served")
    return mask.expand(shape)


def _everything(window: Tensor, topk: int) -> Tensor:
    """Every token of each window."""
    token = window[..., :1] + torch.arange(topk, dtype=torch.int32, device=window.device)
    return torch.where(token < window[..., 1:], token, -1)


def _chosen(rule: Rule, queries: Tensor, keys: Tensor, weights: Tensor, window: Tensor) -> Tensor:
    """Score and select: all sequences at once where their logits are few, else one after the other, in bounded memory."""
    batch, length, tokens = *queries.shape[:2], keys.shape[1]
    if length == 1:
        return _chosen_decoding(rule, queries, keys, weights, window)
    operands = _operands(rule, queries, keys, weights)
    if batch > 1 and batch * length * row_bytes(tokens, "fp32") <= choice.LOGITS_BYTES:
        return _chosen_together(rule, operands, window, tokens).view(batch, length, rule.topk)
    parts = []
    for row in range(batch):
        q, k, w = (_sequence(each, batch, row) for each in (operands[0], operands[1], operands[3]))
        k_scale = None if operands[2] is None else _sequence(operands[2], batch, row)
        starts, ends = (bound.clone(memory_format=torch.contiguous_format) for bound in window[row].unbind(-1))
        parts.append(choice.index_select(q, k, k_scale, w, starts, ends, rule.topk, scores=rule.scores))
    return torch.stack(parts)


def _sequence(rows: Tensor, batch: int, number: int) -> Tensor:
    """The rows of one sequence of the batch."""
    return rows.unflatten(0, (batch, -1))[number]


def _chosen_decoding(rule: Rule, queries: Tensor, keys: Tensor, weights: Tensor, window: Tensor) -> Tensor:
    """One query of each sequence, whose keys are taken for pages of a cache: every SM scores a share of them."""
    batch, tokens = keys.shape[:2]
    missing = -tokens % _PAGE
    if missing:
        keys = nn.functional.pad(keys, (0, 0, 0, missing))
    q, k, k_scale, w = _operands(rule, queries, keys, weights)
    cache = k.view(-1, _PAGE, 1, k.shape[-1])
    if k_scale is not None:
        cache = torch.cat([k.view(torch.uint8).view(len(cache), -1), k_scale.view(torch.uint8).view(len(cache), -1)], dim=1)
        cache = cache.view(len(cache), _PAGE, 1, -1)
    table = torch.arange(len(cache), dtype=torch.int32, device=k.device).view(batch, -1)
    # Of one sequence a bound is a view that is contiguous, at an address that kernels do not take.
    starts, ends = (bound.clone(memory_format=torch.contiguous_format) for bound in window.unbind(-1))
    return choice.index_select_paged(
        q[:, None], cache, w, ends, table, tokens, rule.topk, starts=starts, slots=False, scores=rule.scores
    )


def _operands(rule: Rule, queries: Tensor, keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """q [rows, heads, head_dim], k [tokens, head_dim], its scales if any, weights [rows, heads], sequence after sequence."""
    q, k, w = queries.flatten(0, 1), keys.flatten(0, 1), weights.flatten(0, 1).contiguous()
    if rule.scores == "fp8":
        unfolded = q.shape[1] ** 0.5 * q.shape[2] ** 0.5  # quantising folds both roots in again
        q, w = functions.quantize_index_q(q.bfloat16().contiguous(), w * unfolded)
        return q, *functions.quantize_index_k(k.bfloat16().contiguous()), w
    if q.is_cuda or k.dtype is not q.dtype:
        q, k = (each.to(torch.bfloat16 if q.is_cuda else torch.float32) for each in (q, k))
    return q.contiguous(), k.contiguous(), None, w


def _chosen_together(rule: Rule, operands: tuple[Tensor, Tensor, Tensor | None, Tensor], window: Tensor, tokens: int) -> Tensor:
    """One call for the rows of all sequences; logits begin at each window's start: rows are no longer than one context."""
    starts, ends = (bound.flatten() for bound in window.unbind(-1))
    before = torch.arange(len(window), dtype=torch.int32, device=window.device).repeat_interleave(window.shape[1]) * tokens
    q, k, k_scale, w = operands
    made = functions.indexer_logits(q, k, k_scale, w, starts + before, ends + before, max_window=tokens, scores=rule.scores)
    chosen = functions.select(made, ends - starts, rule.topk)
    return torch.where(chosen < 0, -1, chosen + starts[:, None])
