"""Layer: the three stages of DeepSeek Sparse Attention in a row, for prefill and for decode over paged caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import choice, functions
from .adaptive import Adaptive
from .adaptive import calls as adaptive_calls
from .distributed.modes import Alone, DataParallel, DecodeStep, PrefillStep
from .errors import InputError
from .problem import checks
from .problem.kv_layouts import KvPlainLayout
from .problem.paged import FIXED, check_cache, check_plain_rows
from .problem.presets import MLA, NO_CACHE, Model
from .runtime import dispatch
from .runtime.serving import Limits, calls

_NO_GROUPS = 'attention "mla", one latent per token; of grouped queries call select and sparse_attention_gqa (docs/models.md)'


class Attended(NamedTuple):
    """What a layer returns."""

    out: Tensor
    lse: Tensor
    chosen: Tensor
    """The tokens (prefill) or physical slots (decode) that each query attended to, -1 where fewer than topk."""


class Layer:
    """Indexer, selection and sparse attention of one model.

    Args:
        model: a ``Model``: ``preset("glm-5")``, ``load("my-model.yaml")``.
        logits_bytes: a step holds at most so many bytes of logits at once, or those of 4 queries (of 4 sequences in decode)
            where these take more; longer contexts are done in chunks.
        parallel: how the ranks of a process group share the work: ``distributed.TensorParallel``, ``ContextParallel`` or
            ``DataParallel``, which say whose rows the arguments and results then are. One rank does everything where absent.
        batch_invariant: a row's choice, out and lse have the same bits whatever the batch, the chunk and the records; as a
            model says it that states ``batch_invariant``. With ``ContextParallel`` out and lse of decode are sums over ranks,
            hence other bits with other numbers of ranks.
        adaptive: topk is "at most": each query attends to as many tokens as this rule gives it, one for all queries. Not with
            ``TensorParallel``, ``ContextParallel`` or gathered results of ``DataParallel``.
    """

    def __init__(
        self,
        model: Model,
        logits_bytes: int = choice.LOGITS_BYTES,
        *,
        parallel: Alone | None = None,
        batch_invariant: bool = False,
        adaptive: Adaptive | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise InputError("model", repr(model), 'a Model: preset("deepseek-v3.2"), or load("my-model.yaml")')
        if model.attention != MLA:
            raise InputError("model", f"attention {model.attention!r}", _NO_GROUPS)
        if model.index_scores != "fp8":
            other = 'index_scores "fp8": a layer quantises; index_select(…, scores="bf16") does not'
            raise InputError("model", f"index_scores {model.index_scores!r}", other)
        if model.pool > 1:
            raise InputError("model", f"pool {model.pool}", "1: index_select_pooled chooses blocks, which no layer calls")
        checks.check_kind("logits_bytes", logits_bytes, "int")
        if parallel is not None and not isinstance(parallel, Alone):
            raise InputError("parallel", repr(parallel), "a TensorParallel, ContextParallel or DataParallel, or None")
        self.parallel = Alone() if parallel is None else parallel
        checks.check_kind("batch_invariant", batch_invariant, "bool")
        self.model = model = replace(model, batch_invariant=batch_invariant or model.invariant)
        self.adaptive = _checked_rule(adaptive, self.parallel)
        self.sm_scale = (model.d_nope + model.d_rope) ** -0.5
        self._options: dict[str, Any] = {"score": model.score, "max_bytes": logits_bytes, "batch_invariant": model.invariant}
        kept = {"keep_first": model.keep_first, "keep_recent": model.keep_recent}
        self._options |= {name: tokens for name, tokens in kept.items() if tokens}
        self._stored: dict[str, Any] = {"d_v": model.d_v}
        if model.kv_layout not in (NO_CACHE, *FIXED):
            tail = model.kv_layout == "bf16"
            self._stored |= {"layout": model.kv_layout, "d_rope": model.d_qk - model.d_v if tail else model.d_rope}

    def prefill(
        self,
        q: Tensor,
        kv: Tensor,
        index_q: Tensor,
        index_weights: Tensor,
        index_k: Tensor,
        index_k_scale: Tensor,
        starts: Tensor,
        ends: Tensor,
        sink: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
    ) -> Attended:
        """Attend from every query to the topk tokens that its indexer scores highest.

        Args:
            q: bf16 [queries, heads, d_nope + d_rope].
            kv: bf16 [tokens, 1, d_nope + d_rope].
            index_q: bf16 [queries, index_heads, index_head_dim].
            index_weights: fp32 or bf16 [queries, index_heads], not scaled.
            index_k, index_k_scale: e4m3 [tokens, index_head_dim] and fp32 [tokens], from ``quantize_index_k``.
            starts, ends: int32 [queries], each query's window.
            sink: fp32 [heads] where the model has sinks (``attn_sink``), else None.
            chosen_lengths: int32 [queries], where to write how many tokens each query chose under an adaptive rule.

        Returns:
            out bf16 [queries, heads, d_v], lse fp32 [queries, heads], chosen int32 [queries, topk].
        """
        self._check(3, q, index_q, index_weights, sink)
        checks.rows("index_k", index_k, (None, self.model.index_head_dim), checks.FP8, like=q)
        checks.rows("kv", kv, (len(index_k), 1, q.shape[-1]), torch.bfloat16, like=q)
        checks.tensor("index_k_scale", index_k_scale, (len(index_k),), torch.float32, like=q)
        for name, value in (("starts", starts), ("ends", ends)):
            checks.tensor(name, value, (len(q),), torch.int32, like=q, inner_contiguous=True)
        index_q, index_weights = functions.quantize_index_q(index_q, index_weights)
        scored = index_q, index_weights, index_k, index_k_scale, starts.contiguous(), ends.contiguous()
        options = self._with(chosen_lengths, ends)
        step = PrefillStep(q, kv, *scored, self.model.topk, self.sm_scale, sink, options, {"d_v": self.model.d_v})
        return Attended(*self.parallel.prefill(step))

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        index_q: Tensor,
        index_weights: Tensor,
        index_cache: Tensor,
        lengths: Tensor,
        page_table: Tensor,
        max_context: int,
        sink: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
    ) -> Attended:
        """Attend from the newest queries of every sequence to the topk tokens of its paged caches. Safe in a CUDA graph.

        Args:
            q: bf16 [batch, next_n, heads, d_nope + d_rope].
            kv_cache, index_cache: the paged caches, which share a page table and have the model's page size.
            index_q: bf16 [batch, next_n, index_heads, index_head_dim].
            index_weights: fp32 or bf16 [batch, next_n, index_heads], not scaled.
            lengths: int32 [batch, next_n], tokens that each query sees.
            page_table: int32 [batch, max_pages].
            max_context: at least the longest length; fixed while a graph is in use.
            sink: as in ``prefill``.
            chosen_lengths: the same, int32 [batch, next_n].

        Returns:
            out bf16 [batch, next_n, heads, d_v], lse fp32 [batch, next_n, heads], chosen int32 [batch, next_n, topk] (slots).
        """
        if self.model.kv_layout == NO_CACHE:
            raise InputError("kv_cache", "a tensor", f"a model with a paged KV cache; {self.model.name} states kv_layout: none")
        self._check(4, q, index_q, index_weights, sink)
        layout = self.model.cache
        if isinstance(layout, KvPlainLayout):
            self._check_page("kv_cache", check_plain_rows("kv_cache", kv_cache, layout.width, torch.bfloat16, q))
        else:
            self._check_page("kv_cache", check_cache("kv_cache", kv_cache, layout.bytes_per_token))
        self._check_page("index_cache", check_cache("index_cache", index_cache, self.model.index_head_dim + 4))
        if len(kv_cache) != len(index_cache):
            raise InputError("kv_cache", f"{len(kv_cache)} blocks", f"{len(index_cache)}, as index_cache has")
        checks.tensor("lengths", lengths, tuple(index_q.shape[:2]), torch.int32, like=q)
        flat_q, flat_weights = functions.quantize_index_q(index_q.flatten(0, 1), index_weights.flatten(0, 1))
        scored = flat_q.view(index_q.shape), flat_weights, index_cache, lengths, page_table, max_context
        options = self._with(chosen_lengths, lengths)
        last = self.model.page, sink, options, self._stored
        step = DecodeStep(q, kv_cache, *scored, self.model.topk, self.sm_scale, *last)
        return Attended(*self.parallel.decode(step))

    def _with(self, chosen_lengths: Tensor | None, like: Tensor) -> dict[str, Any]:
        """Options of ``index_select``; under a rule with a buffer for the lengths of lists."""
        if self.adaptive is None and chosen_lengths is None:
            return self._options
        made = torch.empty_like(like, memory_format=torch.contiguous_format) if chosen_lengths is None else chosen_lengths
        return {**self._options, "adaptive": self.adaptive, "chosen_lengths": made}

    def warmup(
        self,
        *,
        max_queries: int | None = None,
        max_batch: int | None = None,
        max_context: int | None = None,
        next_n: Sequence[int] = (1, 2),
        processes: int | None = None,
    ) -> int:
        """Build and load every kernel that the layer, or an engine that fills its caches, can call within these limits.

        Run it on each device before its first request: afterwards nothing compiles, and any step may be captured in a CUDA
        graph at once. It covers fp32 and bf16 ``index_weights``, int32 and int64 slots and both forms of scales. Only the
        first run on a machine takes long (minutes on few cores); later ones find the build cache.

        Args:
            max_queries: tokens of a prefill step at most; 0 for an engine that only decodes; None for any number.
            max_batch: sequences of a decode step at most; 0 for an engine that only prefills; None for any number.
            max_context: tokens that a query may have before it at most: in decode those of the longest sequence, in prefill
                the keys of all the step's sequences together; None for any number.
            next_n: the queries per sequence of decode steps: 1, and more with multi-token prediction.
            processes: compilers that run at once; by default one per core.

        Returns:
            How many kernels were not loaded before.

        Raises:
            NoGpu, CaptureError, BuildError: see ``dsa_codegen.warmup``.
        """
        limits = Limits(max_queries, max_batch, max_context, next_n)
        further = [] if self.adaptive is None else adaptive_calls(self.adaptive, self.model, limits)
        wanted = [*calls(self.model, limits), *self.parallel.further(self.model, limits), *further]
        return dispatch.warmup(wanted, processes)

    def _check(self, dims: int, q: Tensor, index_q: Tensor, index_weights: Tensor, sink: Tensor | None) -> None:
        """Other heads than the model's would be served, by kernels that nobody tuned or warmed up."""
        model = self.model
        for name, value, (heads, width) in (
            ("q", q, (model.heads, model.d_nope + model.d_rope)),
            ("index_q", index_q, (model.index_heads, model.index_head_dim)),
        ):
            checks.check_kind(name, value, "Tensor")
            if value.dim() != dims or value.shape[-2:] != (heads, width):
                raise InputError(name, f"shape {list(value.shape)}", f"[…, {heads}, {width}], as {model.name} has")
        rows = list(q.shape[:-2])
        checks.check_kind("index_weights", index_weights, "Tensor")
        for name, value, allowed in (
            ("index_q", index_q, [*rows, *index_q.shape[-2:]]),
            ("index_weights", index_weights, [*rows, model.index_heads]),
        ):
            if list(value.shape) != allowed:
                raise InputError(name, f"shape {list(value.shape)}", f"shape {allowed}: the rows of q")
        if (sink is not None) != model.attn_sink:
            came, wanted = ("a tensor", "None") if sink is not None else ("None", f"fp32 [{model.heads}]")
            raise InputError("sink", came, f"{wanted}, as {model.name} states attn_sink: {str(model.attn_sink).lower()}")

    def _check_page(self, name: str, page: int) -> None:
        """The selection makes slots of the model's page: in a cache of other pages they would name other tokens."""
        if page != self.model.page:
            raise InputError(name, f"pages of {page} tokens", f"{self.model.page}, as {self.model.name} states")


def _checked_rule(adaptive: object, parallel: Alone) -> Adaptive | None:
    """The rule, where one rank knows all scores of its rows and no rank wants another's lists."""
    if adaptive is None:
        return None
    if not isinstance(adaptive, Adaptive):
        raise InputError("adaptive", repr(adaptive), "an Adaptive, or None")
    for name in ("min_score", "mass", "counts"):
        if isinstance(getattr(adaptive, name), Tensor):
            raise InputError(f"adaptive.{name}", "a tensor", "a number for all queries; index_select takes one for each")
    gathers = type(parallel) is not Alone and not (type(parallel) is DataParallel and parallel.counts is None)
    if gathers:
        raise InputError(
            "adaptive", "a rule", f"None with {type(parallel).__name__}, whose ranks exchange lists of topk entries"
        )
    return adaptive
