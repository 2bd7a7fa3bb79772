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
from ..distributed import ContextParallel, DataParallel, TensorParallel
from ..distributed.gather import gathered, place
from ..distributed.modes import Alone
from ..errors import InputError
from ..problem.paged import FIXED
from ..problem.presets import NO_CACHE, Model
from ..runtime import dispatch
from ..runtime.serving import Limits
from . import plain
from .blocks import in_blocks
from .cache import LayerCache, sharded
from .context import Context, made_of
from .indexer import Indexer
from .rotary import rotated
from .shape import Shape
from .step import Step
from .warmup import calls, shared_calls

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
        parallel: how ranks share the work, as ``PagedCache`` has it; one rank does everything where None. ``TensorParallel``:
            heads and scoring are split, outputs summed. ``ContextParallel("interleaved")``: every rank has the whole layer, and
            of a prefill step the rows of the tokens that its caches hold; in decode all ranks have all rows, and with
            ``own_heads`` each multiplies with its part of the heads, and outputs are summed. ``DataParallel``: every rank has
            sequences of its own, none perhaps; with ``counts`` (rows of a step) it returns all ranks' rows.
        group: short for ``TensorParallel(group)``.
        device, dtype: of the parameters. Kernels compute in BF16 and FP8 whatever they are.

    Raises:
        InputError: latents of another size, heads that do not divide among the ranks, or a mode's options that a module has
            no use for.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        *,
        sm_scale: float | None = None,
        eps: float = 1e-6,
        parallel: Alone | None = None,
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
        self.parallel = _mode(parallel, group, model)
        self.rank, self.ranks = place(self.parallel.group) if isinstance(self.parallel, TensorParallel) else (0, 1)
        if model.heads % self.ranks:
            raise InputError("group", f"{self.ranks} ranks", f"a divisor of {model.heads} heads")
        self.model, self.shape = model, shape
        self.heads = model.heads // self.ranks
        self.sm_scale = (shape.d_head + model.d_rope) ** -0.5 if sm_scale is None else sm_scale
        self.q_a_proj = nn.Linear(shape.hidden, shape.q_rank, bias=False, **made)
        self.q_a_layernorm = nn.RMSNorm(shape.q_rank, eps=eps, **made)
        self.q_b_proj = nn.Linear(shape.q_rank, self.heads * (shape.d_head + model.d_rope), bias=False, **made)
        self.kv_a_proj_with_mqa = nn.Linear(shape.hidden, _LATENT + model.d_rope, bias=False, **made)
        self.kv_a_layernorm = nn.RMSNorm(_LATENT, eps=eps, **made)
        self.kv_b_proj = nn.Linear(_LATENT, self.heads * (shape.d_head + shape.d_v), bias=False, **made)
        self.o_proj = nn.Linear(self.heads * shape.d_v, shape.hidden, bias=False, **made)
        self.indexer = Indexer(model, shape, eps=eps, parallel=self.parallel, **made)
        self.sinks = nn.Parameter(torch.zeros(self.heads, device=device)) if model.attn_sink else None

    def forward(self, hidden: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """Attend from the step's tokens, storing them first.

        Args:
            hidden: [tokens, hidden], normalised, in the order of the step.
            cache: this layer's caches (``PagedCache.layers[i]``).
            step: from ``PagedCache.prefill``, ``decode`` or ``step``; the same for all layers.

        Returns:
            [tokens, hidden], what is added to the residual stream.

        Raises:
            InputError: ``hidden`` requires a gradient, where gradients are on; or a step of caches with another ``parallel``.
        """
        if torch.is_grad_enabled() and hidden.requires_grad:
            served = "none that does: this serves; call it under torch.no_grad(), or train with dsa_codegen.train.run_layer"
            raise InputError("hidden", "a tensor that requires a gradient", served)
        if (step.shared is not None) != isinstance(self.parallel, ContextParallel):
            own = f"one of PagedCache(parallel={type(self.parallel).__name__}(…)), as the layer has it"
            raise InputError("step", "one of caches with another parallel", own)
        with torch.no_grad():
            return self._forward(hidden, cache, step)

    def _forward(self, hidden: Tensor, cache: LayerCache, step: Step) -> Tensor:
        q_low = self.q_a_layernorm(self._project(self.q_a_proj, hidden))
        self._store(self._project(self.kv_a_proj_with_mqa, hidden), cache, step)
        context = None if step.context is None else made_of(self.model, cache, step, self.parallel)
        chosen = self.indexer(hidden, q_low, cache, step, context)
        up_key, up_value = self.kv_b_proj.weight.view(self.heads, -1, _LATENT).split([self.shape.d_head, self.shape.d_v], 1)
        out = self._attend(self._queries(q_low, up_key, step), chosen, cache, step, context).to(hidden.dtype)
        heads = self._heads_of(out)
        values = self._project(lambda rows: _by_head(rows, up_value[heads].transpose(1, 2)), out).flatten(1)
        if heads == slice(0, self.heads):
            return self._of_all_ranks(self._project(self.o_proj, values), partial=self.ranks > 1)
        columns = self.o_proj.weight[:, heads.start * self.shape.d_v : heads.stop * self.shape.d_v]
        return self._of_all_ranks(self._project(lambda rows: nn.functional.linear(rows, columns), values), partial=True)

    def _heads_of(self, out: Tensor) -> slice:
        """Whose heads' outputs [tokens, heads, 512] are: all of the layer's, or of those that all ranks have the rank's own."""
        if out.shape[1] == self.heads:
            return slice(0, self.heads)
        assert isinstance(self.parallel, ContextParallel)
        first = place(self.parallel.group)[0] * out.shape[1]
        return slice(first, first + out.shape[1])

    def _project(self, multiply: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``multiply(rows)``, where the model is batch invariant in blocks of rows."""
        return in_blocks(multiply, rows) if self.model.invariant else multiply(rows)

    def _of_all_ranks(self, result: Tensor, partial: bool) -> Tensor:
        """What the ranks have of the result, joined: ``partial`` sums added up, or rows of ranks that want all of them.

        A collective adds up as its message's size makes it; in the order of ranks it is batch invariant.
        """
        group = getattr(self.parallel, "group", None)
        if isinstance(self.parallel, DataParallel) and self.parallel.counts is not None:
            return self.parallel.everyones(result)
        if partial and self.model.invariant:
            return functools.reduce(torch.add, gathered(result, group).float()).to(result.dtype)
        if partial:
            dist.all_reduce(result, group=group)
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
        width = self.shape.d_head + self.model.d_rope  # no -1: of no rows it could be any
        q = self._project(self.q_b_proj, q_low).view(len(q_low), self.heads, width)
        nope, rope = q.split([self.shape.d_head, self.model.d_rope], 2)
        absorbed = self._project(lambda rows: _by_head(rows, up_key), nope)
        turned = rotated(rope, step.cos_sin, step.positions, self.shape.rotary)
        return torch.cat((absorbed, turned), 2)

    def _attend(self, q: Tensor, chosen: Tensor, cache: LayerCache, step: Step, context: Context | None) -> Tensor:
        """[tokens, heads, 512], in BF16, or in the dtype in which latents are kept."""
        q = q.to(torch.bfloat16 if cache.kv.dtype == torch.uint8 else cache.kv.dtype)
        options: dict[str, Any] = {"batch_invariant": self.model.invariant}
        options["sink"] = None if self.sinks is None else self.sinks.float()
        if context is None:
            rows = step.lengths.shape
            listed = q.view(*rows, *q.shape[1:]), cache.kv, chosen.view(*rows, -1), step.page_table, self.sm_scale
            return self.parallel.attend_paged(*listed, page=self.model.page, **options)[0].flatten(0, 1)
        latents = context.latents()
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
        alone = calls(own, self.shape, self.q_a_proj.weight.dtype, plain_latents, limits)
        return dispatch.warmup([*alone, *shared_calls(own, self.parallel, limits)], processes)

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


def _mode(parallel: object, group: Any, model: Model) -> Alone:
    """The mode that is asked for, checked for what a module can do."""
    if group is not None:
        if parallel is not None:
            raise InputError("group", "a group", "None beside parallel, which names its own")
        return TensorParallel(group)
    if parallel is None:
        return Alone()
    ranks, _ = sharded(parallel, model.page)
    if isinstance(parallel, ContextParallel) and parallel.own_heads and model.heads % ranks:
        raise InputError("parallel.own_heads", f"{ranks} ranks", f"a divisor of {model.heads} heads")
    assert isinstance(parallel, Alone)
    return parallel
