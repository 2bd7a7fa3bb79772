"""Sparse MLA, decode: the newest queries of each sequence attend to listed slots of a paged FP8 latent KV cache.

``s[h,i] = sm_scale · q[h] · kv[indices[i]]``, ``out[h] = Σ_i softmax(s[h])[i] · kv[indices[i], :512]``,
``lse[h] = ln Σ_i exp(s[h,i])`` (DeepSeek-V3.2-Exp report, section 2: MLA in its MQA mode), where ``kv`` is the latent that a
slot states, rounded to bf16: the results are those of prefill attention on the BF16 latents read back from the cache. With a
sink, ``exp(sink[h])`` joins the softmax's denominator; lse stays as it is. A slot below 0 or past the cache means "no token".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks
from ...problem.caches import KvLayout, KvV4Layout, KvV32Layout, kv_layout, tokens_of, valid_slots
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.paged import check_cache
from ...problem.presets import KV_LAYOUTS, NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ...problem.values import Sizes, Spec
from ..attended import check_scale, compare_attended

_FILL = 1 << 16  # tokens of a cache that are drawn and packed at a time


@dataclass(frozen=True)
class AttentionPagedSpec(Spec):
    """What changes the code."""

    heads: int
    topk: int
    kv_layout: str = "v32"
    page: int = 64
    lengths: bool = False
    """Whether only the first ``lengths`` entries of a row count."""
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        self.require_range("topk", 1, 1 << 20)
        self.require_in("kv_layout", KV_LAYOUTS)
        self.require_range("page", 1, 1024)

    @property
    def layout(self) -> KvLayout:
        """How a block of the cache is laid out."""
        return kv_layout(self.kv_layout, self.page)


@dataclass(frozen=True)
class AttentionPagedSizes(Sizes):
    """What varies from call to call."""

    batch: int
    next_n: int
    tokens: int
    """Slots of the cache."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"batch": (2, 17, 65)}


class AttentionPagedProblem(Problem[AttentionPagedSpec, AttentionPagedSizes]):
    """See the module's first lines."""

    name = "attention_paged"
    summary = "Sparse MLA decode: the newest queries attend to listed slots of a paged FP8 latent KV cache."
    function = "sparse_attention_paged"
    schema = (
        "(Tensor q, Tensor cache, Tensor indices, float sm_scale, Tensor? lengths=None, Tensor? sink=None) -> (Tensor, Tensor)"
    )
    spec_type = AttentionPagedSpec
    sizes_type = AttentionPagedSizes
    minor = frozenset({"lengths", "sink", "page"})

    def specs(self, model: Model) -> Sequence[AttentionPagedSpec]:
        if model.kv_layout == NO_CACHE:
            return ()
        return (AttentionPagedSpec(model.heads, model.topk, model.kv_layout, model.page, sink=model.attn_sink),)

    def bind(self, *args: Any) -> tuple[AttentionPagedSpec, AttentionPagedSizes, Inputs]:
        q, cache, indices, sm_scale, lengths, sink = args
        q = checks.tensor("q", q, (None, None, None, None), torch.bfloat16)
        batch, next_n, heads, d_qk = q.shape
        layout = _layout_of(d_qk)
        page = check_cache("cache", cache, layout.bytes_per_token, like=q)
        topk = checks.tensor("indices", indices, (batch, next_n, None), torch.int32, like=q).shape[2]
        if lengths is not None:
            per_query = isinstance(lengths, Tensor) and lengths.dim() == 2
            checks.tensor("lengths", lengths, (batch, next_n) if per_query else (batch,), torch.int32, like=q)
        if sink is not None:
            checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        check_scale(sm_scale)
        spec = AttentionPagedSpec(heads, topk, layout.name, page, lengths is not None, sink is not None)
        inputs = {"q": q, "cache": cache, "indices": indices, "sm_scale": sm_scale, "lengths": lengths, "sink": sink}
        return spec, AttentionPagedSizes(batch, next_n, cache.shape[0] * page), inputs

    def inputs(self, spec: AttentionPagedSpec, case: Case[AttentionPagedSizes], draw: Draw) -> Inputs:
        batch, next_n = case.sizes.batch, case.sizes.next_n
        layout, blocks = spec.layout, -(-case.sizes.tokens // spec.page)
        indices = _indices(draw, batch * next_n, blocks * spec.page, spec.topk)
        lengths = None
        if case.distribution == "ragged":
            indices = _spoiled(draw, indices, blocks * spec.page)
        if spec.lengths:
            per_query = case.sizes.batch % 2 == 0
            lengths = draw.integers(-1, spec.topk + 3, *((batch, next_n) if per_query else (batch,)))
        return {
            "q": draw.normal(batch, next_n, spec.heads, layout.d_nope + layout.d_rope, dtype=torch.bfloat16),
            "cache": _cache(layout, blocks, draw),
            "indices": indices.view(batch, next_n, spec.topk),
            "sm_scale": (layout.d_nope + layout.d_rope) ** -0.5,
            "lengths": lengths,
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }

    def reference(self, spec: AttentionPagedSpec, inputs: Inputs) -> Outputs:
        outputs = self.allocate(spec, inputs)
        out = torch.zeros_like(outputs["out"], dtype=torch.float32)
        lse = torch.full_like(outputs["lse"], -math.inf)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:2])).tolist():
            latent = _listed(spec, inputs, *at)
            scores = inputs["q"][tuple(at)].float() @ latent.T * inputs["sm_scale"]
            lse[tuple(at)] = total = scores.logsumexp(-1)
            if inputs["sink"] is not None:
                total = torch.logaddexp(total, inputs["sink"])
            out[tuple(at)] = (scores - total[:, None]).exp() @ latent[:, : spec.layout.d_v]
        return {"out": out, "lse": lse}

    def allocate(self, spec: AttentionPagedSpec, inputs: Inputs) -> Outputs:
        shape, device = inputs["q"].shape[:3], inputs["q"].device
        return {
            "out": torch.empty(*shape, spec.layout.d_v, dtype=torch.bfloat16, device=device),
            "lse": torch.empty(shape, dtype=torch.float32, device=device),
        }

    def check(self, spec: AttentionPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare_attended(outputs, reference)

    def cost(self, spec: AttentionPagedSpec, case: Case[AttentionPagedSizes]) -> Cost:
        layout, rows = spec.layout, case.sizes.batch * case.sizes.next_n
        d_qk, chosen = layout.d_nope + layout.d_rope, min(spec.topk, case.sizes.tokens)
        flops = 2 * rows * spec.heads * chosen * (d_qk + layout.d_v)
        gathered = min(case.sizes.tokens, rows * chosen) * layout.bytes_per_token
        return Cost(flops, gathered + 4 * rows * spec.topk + rows * spec.heads * (2 * d_qk + 2 * layout.d_v + 4), "bf16")

    def cases(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        sizes = ((2, 2, 333), (1, 1, 40), (3, 1, 0), (0, 1, 64))
        return [Case(AttentionPagedSizes(1, 2, 300), "random"), *(Case(AttentionPagedSizes(*size), "ragged") for size in sizes)]

    def long_cases(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        return [Case(AttentionPagedSizes(75, 2, 3000), "ragged")]  # more blocks than a GPU has SMs

    def options(self, spec: AttentionPagedSpec) -> Sequence[AttentionPagedSpec]:
        return tuple(replace(spec, lengths=lengths, sink=sink) for lengths in (False, True) for sink in (False, True))

    def workloads(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        # Far more tokens than fit in L2 where a batch would bring them.
        sizes = ((64, 1, 1 << 20), (1, 1, 1 << 16), (8, 1, 1 << 18), (128, 1, 1 << 20))
        return [Case(AttentionPagedSizes(*size), "random") for size in sizes]


def _layout_of(d_qk: int) -> type[KvV32Layout | KvV4Layout]:
    for layout in (KvV32Layout, KvV4Layout):
        if layout.d_nope + layout.d_rope == d_qk:
            return layout
    raise InputError("q", f"{d_qk} channels", "576 for the 656-byte cache, 512 for the 584-byte one")


def _cache(layout: KvLayout, blocks: int, draw: Draw) -> Tensor:
    """Random latents of different magnitudes, quantised into every slot."""
    cache = layout.empty(blocks, draw.device)
    for first in range(0, blocks * layout.page if draw.device != "meta" else 0, _FILL):
        count = min(_FILL, blocks * layout.page - first)
        nope = draw.normal(count, layout.d_nope) * draw.uniform(count, 1, low=0.05, high=0.5)
        values, scales = quantize_groups(nope, layout.group, isinstance(layout, KvV4Layout))
        slots = torch.arange(first, first + count, device=cache.device)
        layout.pack(cache, slots, values, scales, draw.normal(count, layout.d_rope, scale=0.3))
    return cache


def _indices(draw: Draw, rows: int, slots: int, topk: int) -> Tensor:
    """int32 [rows, topk]: random slots, no slot twice in a row of the tensor; -1 where the cache holds too few."""
    chosen = torch.full((rows, topk), -1, dtype=torch.int32, device=draw.device)
    for row in range(rows if slots else 0):
        order = draw.permutation(slots)[:topk]
        chosen[row, : len(order)] = order.int()
    return chosen


def _spoiled(draw: Draw, indices: Tensor, slots: int) -> Tensor:
    """Every eighth entry invalid at random places, the first row without a token."""
    invalid = torch.tensor([-1, slots, 2**31 - 1, -(2**31)], dtype=torch.int32, device=draw.device)
    replaced = draw.uniform(*indices.shape) < 1 / 8
    spoiled = torch.where(replaced, invalid[draw.integers(0, 4, *indices.shape, dtype=torch.int64)], indices)
    spoiled[:1] = slots
    return spoiled


def _listed(spec: AttentionPagedSpec, inputs: Inputs, row: int, query: int) -> Tensor:
    """fp32 latents [valid entries, d_qk] of one query, rounded to bf16 as reading the cache back rounds them."""
    slots, lengths = inputs["indices"][row, query], inputs["lengths"]
    if lengths is not None:
        slots = slots[: max(0, int(lengths[row, query] if lengths.dim() == 2 else lengths[row]))]
    slots = slots[valid_slots(slots, tokens_of(spec.layout, inputs["cache"]))]
    return spec.layout.dequantize(inputs["cache"], slots).bfloat16().float()
