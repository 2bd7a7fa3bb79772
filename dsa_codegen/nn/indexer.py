"""Indexer: which tokens a layer attends to, from its projections to the choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import choice, distributed, functions
from ..problem.presets import Model
from . import plain
from .blocks import in_blocks
from .cache import LayerCache
from .shape import Shape
from .step import Step


class Indexer(nn.Module):
    """The lightning indexer of one layer; parameters are named as checkpoints name them.

    Args:
        group: a process group whose ranks share the scoring of a prefill step's rows; None for one rank.
    """

    def __init__(self, model: Model, shape: Shape, *, eps: float = 1e-6, group: Any = None, **made: Any) -> None:
        super().__init__()
        self.model, self.shape, self.group = model, shape, group
        heads, width = model.index_heads, model.index_head_dim
        self.wq_b = nn.Linear(shape.q_rank, heads * width, bias=False, **made)
        self.wk = nn.Linear(shape.hidden, width, bias=False, **made)
        self.k_norm = nn.LayerNorm(width, eps=eps, **made)
        self.weights_proj = nn.Linear(shape.hidden, heads, bias=False, **made)

    @torch.no_grad()
    def forward(self, hidden: Tensor, q_low: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """Store the step's keys and choose each query's tokens.

        Args:
            hidden: [tokens, hidden]; q_low: [tokens, q_rank], the normalised low rank of the queries.

        Returns:
            int32 [tokens, topk]: slots, or places in the step's context. Where no window is longer than topk, nothing was
            scored or selected: the step holds the windows themselves.
        """
        if step.chosen is not None:
            self._keys_alone(hidden, cache, step)
            return step.chosen
        heads, width = self.model.index_heads, self.model.index_head_dim
        project = self._project
        q, weights, k = (
            project(self.wq_b, q_low).view(-1, heads, width),
            project(self.weights_proj, hidden),
            project(self.wk, hidden),
        )
        values, folded = (
            self._unquantised(q, weights, k, cache, step) if _plain(cache) else self._prologue(q, weights, k, cache, step)
        )
        return self._paged(values, folded, cache, step) if step.context is None else self._flat(values, folded, cache, step)

    def _project(self, linear: nn.Linear, rows: Tensor) -> Tensor:
        return in_blocks(linear, rows) if self.model.invariant else linear(rows)

    def _keys_alone(self, hidden: Tensor, cache: LayerCache, step: Step) -> None:
        nothing, k = hidden.new_empty(len(hidden), 0, self.model.index_head_dim), self._project(self.wk, hidden)
        if _plain(cache):
            self._unquantised(nothing, nothing[..., 0], k, cache, step)
        else:
            self._prologue(nothing, nothing[..., 0].bfloat16(), k, cache, step)

    def _prologue(self, q: Tensor, weights: Tensor, k: Tensor, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        """e4m3 queries and fp32 folded weights; the keys are stored. One launch."""
        shape, norm = self.shape, (self.k_norm.weight, self.k_norm.bias)
        placed = step.cos_sin, step.positions, step.slots, cache.index_k
        return functions.index_prologue(
            q.bfloat16(),
            weights,
            k.bfloat16(),
            *norm,
            *placed,
            eps=self.k_norm.eps,
            rotary=shape.index_rotary,
            hadamard=shape.hadamard,
            power_of_two=shape.power_of_two,
            batch_invariant=self.model.invariant,
        )

    def _unquantised(self, q: Tensor, weights: Tensor, k: Tensor, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        """The same in torch, without FP8."""
        q, k = plain.index_rows(q, k, self.k_norm, self.shape.index_rotary, step)
        plain.store(k, step.slots, cache.index_k)
        return q.to(cache.index_k.dtype), plain.folded(weights, self.model.index_heads, self.model.index_head_dim)

    def _paged(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Step) -> Tensor:
        q = q.view(*step.lengths.shape, *q.shape[1:])
        paged = cache.index_k, weights, step.lengths, step.page_table, step.max_context
        chosen = choice.index_select_paged(q, *paged, self.model.topk, **self._options(cache))
        return chosen.flatten(0, 1)

    def _flat(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Step) -> Tensor:
        assert step.context is not None and step.starts is not None and step.ends is not None
        options = self._options(cache)
        keys: tuple[Tensor, Tensor | None]
        if _plain(cache):
            keys = plain.rows_at(step.context, cache.index_k), None
        else:
            keys = functions.gather_index_k(cache.index_k, step.context)
        arguments: tuple[Any, ...] = q, *keys, weights, step.starts, step.ends, self.model.topk
        if step.bounds is None:
            return choice.index_select(*arguments, **options)
        return distributed.index_select_by_rows(*arguments, group=self.group, bounds=step.bounds, **options)

    def _options(self, cache: LayerCache) -> dict[str, Any]:
        """Of ``index_select``."""
        scores = "bf16" if _plain(cache) else "fp8"
        return {"score": self.model.score, "scores": scores, "batch_invariant": self.model.invariant}


def _plain(cache: LayerCache) -> bool:
    """Whether keys lie in the cache as they are."""
    return cache.index_k.dtype != torch.uint8
