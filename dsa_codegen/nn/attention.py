"""SparseAttention: one layer of DeepSeek Sparse Attention, from the residual stream and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functions
from ..distributed.gather import gathered
from ..errors import InputError
from ..problem.paged import FIXED
from ..problem.presets import NO_CACHE, Model
from ..runtime import dispatch
from ..runtime.serving import Limits
from . import plain
from .blocks import in_blocks
from .cache import LayerCache
from .indexer import Indexer
from .rotary import rotated
from .shape import Shape
from .step import Step
from .warmup import calls

_LATENT = 512
_BY_ROWS = ("q_b_proj.weight", "kv_b_proj.weight", "sinks")
_BY_COLUMNS = ("o_proj.weight",)


class SparseAttention(nn.Module):
    """Low-rank projections, the indexer, sparse attention in the latent space, for inference.

    The up projections of keys and values are absorbed into queries and outputs (DeepSeek-V2 report, section 2.1.2). Parameters
    have the names of DeepSeek's checkpoints, so that ``load_state_dict`` takes a layer's.

    Args:
        model: the whole model's stages; latents of 512 channels and 64 rotary ones.
        shape: the projections around them.
        sm_scale: factor of the scores; (d_head + 64)^-0.5 where None (YaRN multiplies it by mscale²).
        eps: of the three norms.
        group: a process group that shares the heads (tensor parallelism); None for one rank. Outputs are summed over it.
        device, dtype: of the parameters. Kernels compute in BF16 and FP8 whatever they are.

    Raises:
        InputError: latents of another size, or heads that do not divide among the ranks.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        *,
        sm_scale: float | None = None,
        eps: float = 1e-6,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if (model.d_nope, model.d_rope) != (_LATENT, 64):
            raise InputError("model", f"latents of {model.d_nope} + {model.d_rope} channels", f"{_LATENT} + 64")
        if model.kv_layout not in (*FIXED, NO_CACHE):
            other = f"{' or '.join(FIXED)}; PagedCache(plain=torch.bfloat16) keeps latents as they are"
            raise InputError("model", f"kv_layout {model.kv_layout}", other)
        self.rank, self.ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if model.heads % self.ranks:
            raise InputError("group", f"{self.ranks} ranks", f"a divisor of {model.heads} heads")
        self.model, self.shape, self.group = model, shape, group
        self.heads = model.heads // self.ranks
        self.sm_scale = (shape.d_head + model.d_rope) ** -0.5 if sm_scale is None else sm_scale
        self.q_a_proj = nn.Linear(shape.hidden, shape.q_rank, bias=False, **made)
        self.q_a_layernorm = nn.RMSNorm(shape.q_rank, eps=eps, **made)
        self.q_b_proj = nn.Linear(shape.q_rank, self.heads * (shape.d_head + model.d_rope), bias=False, **made)
        self.kv_a_proj_with_mqa = nn.Linear(shape.hidden, _LATENT + model.d_rope, bias=False, **made)
        self.kv_a_layernorm = nn.RMSNorm(_LATENT, eps=eps, **made)
        self.kv_b_proj = nn.Linear(_LATENT, self.heads * (shape.d_head + shape.d_v), bias=False, **made)
        self.o_proj = nn.Linear(self.heads * shape.d_v, shape.hidden, bias=False, **made)
        self.indexer = Indexer(model, shape, eps=eps, group=group, **made)
        self.sinks = nn.Parameter(torch.zeros(self.heads, device=device)) if model.attn_sink else None

    @torch.no_grad()
    def forward(self, hidden: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """Attend from the step's tokens, storing them first.

        Args:
            hidden: [tokens, hidden], normalised, in the order of the step.
            cache: this layer's caches (``PagedCache.layers[i]``).
            step: from ``PagedCache.prefill``, ``decode`` or ``step``; the same for all layers.

        Returns:
            [tokens, hidden], what is added to the residual stream.
        """
        q_low = self.q_a_layernorm(self._project(self.q_a_proj, hidden))
        self._store(self._project(self.kv_a_proj_with_mqa, hidden), cache, step)
        chosen = self.indexer(hidden, q_low, cache, step)
        up_key, up_value = self.kv_b_proj.weight.view(self.heads, -1, _LATENT).split([self.shape.d_head, self.shape.d_v], 1)
        out = self._attend(self._queries(q_low, up_key, step), chosen, cache, step)
        values = self._project(lambda rows: _by_head(rows, up_value.transpose(1, 2)), out.to(hidden.dtype))
        return self._of_all_ranks(self._project(self.o_proj, values.flatten(1)))

    def _project(self, multiply: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``multiply(rows)``, where the model is batch invariant in blocks of rows."""
        return in_blocks(multiply, rows) if self.model.invariant else multiply(rows)

    def _of_all_ranks(self, result: Tensor) -> Tensor:
        """Summed over the group. A collective adds up as its message's size makes it; in the order of ranks it is invariant."""
        if self.ranks > 1 and self.model.invariant:
            return functools.reduce(torch.add, gathered(result, self.group).float()).to(result.dtype)
        if self.ranks > 1:
            dist.all_reduce(result, group=self.group)
        return result

    def _store(self, latent: Tensor, cache: LayerCache, step: Step) -> None:
        kept = cache.kv.dtype
        if kept not in (torch.uint8, torch.bfloat16):
            plain.store(plain.latent_rows(latent, self.kv_a_layernorm, self.shape.rotary, step), step.slots, cache.kv)
            return
        functions.store_latent(
            latent.bfloat16(),
            self.kv_a_layernorm.weight,
            step.cos_sin,
            step.positions,
            step.slots,
            cache.kv,
            eps=self.kv_a_layernorm.eps or 1e-6,
            layout=self.model.kv_layout if kept == torch.uint8 else "bf16",
            rotary=self.shape.rotary,
            power_of_two=self.shape.power_of_two and kept == torch.uint8,
            batch_invariant=self.model.invariant,
        )

    def _queries(self, q_low: Tensor, up_key: Tensor, step: Step) -> Tensor:
        """[tokens, heads, 576]: the up projection of keys absorbed, then the rotary channels."""
        q = self._project(self.q_b_proj, q_low).view(len(q_low), self.heads, -1)
        nope, rope = q.split([self.shape.d_head, self.model.d_rope], 2)
        absorbed = self._project(lambda rows: _by_head(rows, up_key), nope)
        turned = rotated(rope, step.cos_sin, step.positions, self.shape.rotary)
        return torch.cat((absorbed, turned), 2)

    def _attend(self, q: Tensor, chosen: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """[tokens, heads, 512], in BF16, or in the dtype in which latents are kept."""
        q = q.to(torch.bfloat16 if cache.kv.dtype == torch.uint8 else cache.kv.dtype)
        options: dict[str, Any] = {"batch_invariant": self.model.invariant}
        options["sink"] = None if self.sinks is None else self.sinks.float()
        if step.context is None:
            rows = step.lengths.shape
            paged = functions.sparse_attention_paged(
                q.view(*rows, *q.shape[1:]), cache.kv, chosen.view(*rows, -1), self.sm_scale, **options
            )
            return paged[0].flatten(0, 1)
        if cache.kv.dtype == torch.uint8:
            latents = functions.gather_kv(cache.kv, step.context, layout=self.model.kv_layout)
        else:
            latents = plain.rows_at(step.context, cache.kv)
        return functions.sparse_attention(q, latents[:, None], chosen[:, None], self.sm_scale, **options)[0]

    def warmup(
        self,
        *,
        max_queries: int | None = None,
        max_batch: int | None = None,
        max_context: int | None = None,
        next_n: Sequence[int] = (1, 2),
        plain_latents: bool = False,
        processes: int | None = None,
    ) -> int:
        """Build and load every kernel of this package that a step within these limits can call; see ``Layer.warmup``.

        Args:
            plain_latents: the caches hold them as they are.
            The others are as in ``Layer.warmup``.

        Returns:
            How many kernels were not loaded before; layers of one model share theirs.
        """
        limits = Limits(max_queries, max_batch, max_context, next_n)
        own = replace(self.model, heads=self.heads)
        return dispatch.warmup(calls(own, self.shape, self.q_a_proj.weight.dtype, plain_latents, limits), processes)

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Load the parameters of the whole layer, of which this rank keeps its heads."""
        self.load_state_dict({name: self._own(name, value) for name, value in state.items()})

    def _own(self, name: str, value: Tensor) -> Tensor:
        if name in _BY_ROWS:
            return value.chunk(self.ranks)[self.rank]
        return value.chunk(self.ranks, 1)[self.rank] if name in _BY_COLUMNS else value


def _by_head(rows: Tensor, weights: Tensor) -> Tensor:
    """[n, heads, a] times [heads, a, b]: [n, heads, b]."""
    return torch.bmm(rows.transpose(0, 1), weights).transpose(0, 1)
