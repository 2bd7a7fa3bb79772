"""Indexer: which tokens a layer attends to, from its projections to the choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import choice, functions
from ..distributed import ContextParallel, TensorParallel
from ..distributed.modes import Alone
from ..problem.presets import Model
from . import plain
from .blocks import in_blocks
from .cache import LayerCache
from .context import Context, made_of
from .shape import Shape
from .step import Step


class Indexer(nn.Module):
    """The lightning indexer of one layer; parameters are named as checkpoints name them.

    Args:
        parallel: how ranks share the scoring, as ``SparseAttention`` has it; one rank scores everything where None.
    """

    def __init__(self, model: Model, shape: Shape, *, eps: float = 1e-6, parallel: Alone | None = None, **made: Any) -> None:
        super().__init__()
        self.model, self.shape, self.parallel = model, shape, Alone() if parallel is None else parallel
        heads, width = model.index_heads, model.index_head_dim
        self.wq_b = nn.Linear(shape.q_rank, heads * width, bias=False, **made)
        self.wk = nn.Linear(shape.hidden, width, bias=False, **made)
        self.k_norm = nn.LayerNorm(width, eps=eps, **made)
        self.weights_proj = nn.Linear(shape.hidden, heads, bias=False, **made)

    @torch.no_grad()
    def forward(self, hidden: Tensor, q_low: Tensor, cache: LayerCache, step: Step, context: Context | None = None) -> Tensor:
        """Store the step's keys and choose each query's tokens.

        Args:
            hidden: [tokens, hidden]; q_low: [tokens, q_rank], the normalised low rank of the queries.
            context: what a prefill step sees, whose latents have been stored; made of the caches where None.

        Returns:
            int32 [tokens, topk]: slots (tokens where caches are sharded), or places in the step's context. Where no window is
            longer than topk, nothing was scored or selected: the step holds the windows themselves.
        """
        if context is None and step.context is not None:
            context = made_of(self.model, cache, step, self.parallel)
        if step.chosen is not None:
            self._keys_alone(hidden, cache, step)
            if context is not None:
                context.start(scored=False)
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
        if context is None:
            return self._paged(values, folded, cache, step)
        context.start(scored=True)
        return self._flat(values, folded, cache, step, context)

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
        options = self._options(cache)
        if step.shared is not None:
            del options["scores"]  # FP8, as caches that are sharded are
        return self.parallel.choose_paged(q, *paged, self.model.topk, page=self.model.page, **options).flatten(0, 1)

    def _flat(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Step, context: Context) -> Tensor:
        options = self._options(cache)
        arguments: tuple[Any, ...] = q, *context.keys(), weights, step.starts, step.ends, self.model.topk
        if isinstance(self.parallel, TensorParallel) and step.bounds is not None:
            return self.parallel.choose(*arguments, bounds=step.bounds, **options)
        if isinstance(self.parallel, ContextParallel):
            options["sms"] = self.parallel.sms
        return choice.index_select(*arguments, **options)

    def _options(self, cache: LayerCache) -> dict[str, Any]:
        """Of ``index_select``."""
        model, scores = self.model, "bf16" if _plain(cache) else "fp8"
        kept = {"keep_first": model.keep_first, "keep_recent": model.keep_recent}
        options: dict[str, Any] = {"score": model.score, "scores": scores, "batch_invariant": model.invariant}
        return options | {name: tokens for name, tokens in kept.items() if tokens}


def _plain(cache: LayerCache) -> bool:
    """Whether keys lie in the cache as they are."""
    return cache.index_k.dtype != torch.uint8
