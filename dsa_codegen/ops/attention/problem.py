"""Sparse MLA, prefill: every query attends to its own list of tokens; all heads share one latent vector per token.

``s[h,i] = sm_scale · q[h] · kv[indices[i]]``, ``out[h] = Σ_i softmax(s[h])[i] · kv[indices[i], :d_v]``,
``lse[h] = ln Σ_i exp(s[h,i])`` (DeepSeek-V3.2-Exp report, section 2: MLA in its MQA mode). With a sink, ``exp(sink[h])``
joins the softmax's denominator; lse stays as it is. An index of -1 or >= the number of tokens means "no token". With FP8
products (``fp8``) q and kv are e4m3 with a scale each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import channels, checks, compare
from ...problem.channels import D_V
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import Model
from ...problem.values import Sizes, Spec
from ..attended import attended, check_buffers, check_scale, compare_attended
from ..logits import exact
from . import fp8

SHARES = (1, 2, 4)
"""Of how many neighbouring queries lists may be joined."""

_CHUNK = 64  # queries; the reference gathers their rows, the draw ranks all tokens for each of them


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """What changes the attention's code."""

    heads: int
    d_qk: int
    """Channels of queries and tokens: ``d_v``, and up to 128 that are key only."""
    topk: int
    lengths: bool = False
    """Whether only the first ``lengths[query]`` entries of a list count."""
    sink: bool = False
    max_logits: bool = False
    """Whether each head's highest score is written out as well."""
    share: int = 1
    """So many neighbouring queries gather the union of their lists together, where a kernel can; results are the same."""
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""
    d_v: int = D_V
    """Channels of a token, the first ones, that are also its value."""
    math: str = "bf16"
    """What is multiplied: "bf16", or "fp8", queries and tokens in e4m3 and weights rounded to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        channels.require(self)
        self.require_range("topk", 1, 1 << 20)
        self.require_in("share", SHARES)
        self.require_in("math", fp8.MATHS)
        if self.math == "fp8":
            self.require_in("share", (1,))
            self.require_in("max_logits", (False,))


@dataclass(frozen=True)
class AttentionSizes(Sizes):
    """What varies from call to call."""

    queries: int
    tokens: int
    # An L2 of 50 MB keeps 8K tokens of 1152 bytes, 32K not quite, and misses most beyond 40K: 16 heads take 1117, 1197, 1447
    # and 1767 µs of 8K, 32K, 64K and 128K tokens (4096 queries, H200).
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"queries": (1025,), "tokens": (16385, 40961, 65537)}


class AttentionProblem(Problem[AttentionSpec, AttentionSizes]):
    """See the module's first lines."""

    name = "attention"
    summary = "Sparse MLA prefill: every query attends to its own list of tokens, all heads sharing one latent vector."
    function = "sparse_attention"
    schema = (
        "(Tensor q, Tensor kv, Tensor indices, float sm_scale, Tensor? lengths=None, Tensor? sink=None, "
        "int share=1, bool batch_invariant=False, int d_v=512, str math='bf16', Tensor? q_scale=None, Tensor? kv_scale=None) "
        "-> (Tensor, Tensor)"
    )
    buffers = ("out", "lse", "max_logits")
    spec_type = AttentionSpec
    sizes_type = AttentionSizes
    minor = frozenset({"lengths", "sink", "max_logits", "batch_invariant"})

    def specs_of(self, model: Model) -> Sequence[AttentionSpec]:
        options: dict[str, Any] = {"sink": model.attn_sink, "batch_invariant": model.invariant, "d_v": model.d_v}
        return (AttentionSpec(model.heads, model.d_qk, model.entries, lengths=model.pool > 1, **options),)

    def bind(self, *args: Any) -> tuple[AttentionSpec, AttentionSizes, Inputs]:
        q, kv, indices, sm_scale, lengths, sink, share, invariant, d_v, products, q_scale, kv_scale, *brought = args
        checks.one_of("math", products, fp8.MATHS)
        q = checks.rows("q", q, (None, None, None), checks.FP8 if products == "fp8" else checks.floating(q))
        queries, heads, d_qk = q.shape
        channels.check("q", d_qk, d_v)
        kv = checks.rows("kv", kv, (None, 1, d_qk), q.dtype, like=q)
        indices = checks.rows("indices", indices, (queries, 1, None), torch.int32, like=q, whole=False)
        scales = fp8.check_scales(q, kv, products, q_scale, kv_scale)
        tokens, topk = kv.shape[0], indices.shape[2]
        if lengths is not None:
            lengths = checks.tensor("lengths", lengths, (queries,), torch.int32, like=q)
        if sink is not None:
            sink = checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        check_scale(sm_scale)
        if share not in SHARES:
            raise InputError("share", str(share), "1, 2 or 4")
        buffers = check_buffers(self.buffers, brought, (queries, heads), d_v, q)
        if scales and "max_logits" in buffers:
            raise InputError("max_logits", "a tensor", 'None where math is "fp8", which keeps no highest scores')
        # A union of lists would be added up in an order that the neighbours decide; and none joins lists of FP8 tokens.
        share = 1 if invariant or scales else share
        options = (lengths is not None, sink is not None, "max_logits" in buffers, sharing(heads, share), invariant)
        spec = AttentionSpec(heads, d_qk, topk, *options, d_v, products)
        inputs = {"q": q, "kv": kv, "indices": indices, "sm_scale": sm_scale, "lengths": lengths, "sink": sink}
        return spec, AttentionSizes(queries, tokens), {**inputs, **scales, **buffers}

    def inputs(self, spec: AttentionSpec, case: Case[AttentionSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        indices = _distinct(draw, queries, tokens, spec.topk, alike=spec.share > 1)
        if case.distribution == "ragged":
            indices = _spoiled(draw, indices, tokens)
        # Scores of deviation 1. Values of 0.1, as FlashMLA's tests have them: rounding the weights to bf16 costs 2^-9
        # of a value where few tokens share them, and the limit's absolute part is 1e-3.
        q = draw.normal(queries, spec.heads, spec.d_qk, dtype=torch.bfloat16, scale=10.0)
        kv = draw.normal(tokens, 1, spec.d_qk, dtype=torch.bfloat16, scale=0.1)
        if case.distribution == "steep":
            _make_steep(draw, kv, spec.d_v, 30.0 if spec.math == "fp8" else 300.0)
        inputs = {
            "q": q,
            "kv": kv,
            "indices": indices[:, None],
            "sm_scale": spec.d_qk**-0.5,
            "lengths": draw.integers(-1, spec.topk + 3, queries) if spec.lengths else None,
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }
        return fp8.quantised(draw, inputs) if spec.math == "fp8" else inputs

    def reference(self, spec: AttentionSpec, inputs: Inputs) -> Outputs:
        q = inputs["q"]
        step = 1 if spec.batch_invariant else _CHUNK  # products of one shape add up in one order
        attend = fp8.attend if spec.math == "fp8" else _attend
        parts = [attend(inputs, slice(first, first + step), spec.d_v) for first in range(0, max(len(q), 1), step)]
        names = self.buffers if spec.max_logits else self.buffers[:2]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def allocate(self, spec: AttentionSpec, inputs: Inputs) -> Outputs:
        return attended(inputs, inputs["q"].shape[:2], spec.d_v, spec.max_logits)

    def check(self, spec: AttentionSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        if spec.math != "fp8":
            return compare_attended(outputs, reference)
        if outputs["out"].isfinite().all():  # what is not finite settles nothing, and is wrong as it is
            chunks = [slice(first, first + _CHUNK) for first in range(0, max(len(outputs["out"]), 1), _CHUNK)]
            near = torch.cat([fp8.settled(outputs["out"][rows], inputs, rows, spec.d_v) for rows in chunks])
            reference = {**reference, "out": near}
        return compare_attended(outputs, reference, compare.FP8_ATTENTION, compare.FP8_LSE)

    def cost(self, spec: AttentionSpec, case: Case[AttentionSizes]) -> Cost:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        chosen = min(spec.topk, tokens)
        flops = 2 * queries * spec.heads * chosen * (spec.d_qk + spec.d_v)
        rows = min(tokens, queries * chosen)
        results = queries * spec.heads * (2 * spec.d_v + 4)
        row = spec.d_qk + 4 if spec.math == "fp8" else 2 * spec.d_qk
        return Cost(flops, row * (queries * spec.heads + rows) + 4 * queries * spec.topk + results, spec.math)

    def cases(self, spec: AttentionSpec) -> Sequence[Case[AttentionSizes]]:
        sizes = ((1, 1), (5, 333), (2, 3000), (3, 0), (0, 40))
        ragged = [Case(AttentionSizes(queries, tokens), "ragged") for queries, tokens in sizes]
        return [Case(AttentionSizes(3, 200), "random"), *ragged]

    def long_cases(self, spec: AttentionSpec) -> Sequence[Case[AttentionSizes]]:
        sizes = ((301, 2500, "ragged"), (140, 4096, "random"), (170, 3000, "steep"))  # a GPU has 132 SMs: rounds of 66 to 132
        return [Case(AttentionSizes(queries, tokens), distribution) for queries, tokens, distribution in sizes]

    def options(self, spec: AttentionSpec) -> Sequence[AttentionSpec]:
        plain = [replace(spec, lengths=lengths, sink=sink) for lengths in (False, True) for sink in (False, True)]
        share = sharing(spec.heads, SHARES[-1])
        if spec.math == "fp8":
            return plain
        together = [replace(plain[-1], share=share)] if share > 1 and not spec.batch_invariant else []
        return (*plain, replace(plain[-1], max_logits=True), *together, replace(plain[-1], share=1, math="fp8"))

    def workloads(self, spec: AttentionSpec) -> Sequence[Case[AttentionSizes]]:
        sizes = ((4096, 32768), (4096, 131072), (512, 32768), (512, 131072))
        return [Case(AttentionSizes(queries, tokens), "random") for queries, tokens in sizes]


def sharing(heads: int, share: int) -> int:
    """How many of ``share`` neighbouring queries gather together: with 32 heads in all, those of a query padded to 8 or 16."""
    return max(min(share, 32 // (8 if heads <= 8 else 16 if heads <= 16 else 32)), 1)


def _distinct(draw: Draw, queries: int, tokens: int, topk: int, alike: bool = False) -> Tensor:
    """int32 [queries, topk]: random tokens, no token twice in a row of the tensor; -1 where the tokens are too few.

    Rows that are ``alike`` ascend, and neighbours share about four fifths of their tokens.
    """
    chosen = torch.full((queries, topk), -1, dtype=torch.int32, device=draw.device)
    for first in range(0, queries if tokens else 0, _CHUNK):
        rows = chosen[first : first + _CHUNK]
        ranks = draw.uniform(len(rows), tokens)
        if alike:
            ranks = torch.where(draw.uniform(len(rows), tokens) < 1 / 10, ranks, draw.uniform(1, tokens))
        order = ranks.topk(min(topk, tokens), dim=1).indices
        rows[:, : order.shape[1]] = order.sort().values.int() if alike else order.int()
    return chosen


def _spoiled(draw: Draw, indices: Tensor, tokens: int) -> Tensor:
    """Every eighth entry invalid at random places, the first row empty, the second empty at its beginning."""
    queries, topk = indices.shape
    invalid = draw.integers(0, 4, queries, topk)
    worst = torch.tensor([-1, tokens, 2**31 - 1, -(2**31)], dtype=torch.int32, device=draw.device)
    spoiled = torch.where(draw.uniform(queries, topk) < 1 / 8, worst[invalid], indices)
    spoiled[:1] = -1
    spoiled[1:2, : topk // 2] = tokens
    return spoiled


def _make_steep(draw: Draw, kv: Tensor, d_v: int, most: float) -> None:
    """A token's channels that are key only times 1, a tenth of ``most``, or ``most``: by 300, maxima rise by hundreds."""
    steps = torch.tensor([1.0, most / 10, most], dtype=kv.dtype, device=kv.device)
    kv[..., d_v:] *= steps[draw.integers(0, 3, len(kv), 1, 1).long()]


def _attend(inputs: Inputs, rows: slice, d_v: int) -> Outputs:
    """What some queries get, in fp32, or in fp64 where they came so."""
    q, kv, chosen = exact(inputs["q"][rows]), inputs["kv"][:, 0], inputs["indices"][rows, 0].long()
    valid = (chosen >= 0) & (chosen < len(kv))
    if inputs["lengths"] is not None:
        valid &= torch.arange(chosen.shape[1], device=q.device) < inputs["lengths"][rows, None]
    latent = torch.zeros(*chosen.shape, q.shape[2], dtype=q.dtype, device=q.device)
    latent[valid] = exact(kv[chosen[valid]])
    scores = torch.einsum("qhd,qkd->qhk", q, latent) * inputs["sm_scale"]
    scores = scores.masked_fill(~valid[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    total = lse if inputs["sink"] is None else torch.logaddexp(lse, inputs["sink"].expand_as(lse))
    weights = torch.exp(scores - total[..., None]).masked_fill(~valid[:, None], 0.0)
    out = torch.einsum("qhk,qkd->qhd", weights, latent[..., :d_v])
    return {"out": out, "lse": lse, "max_logits": scores.amax(-1)}
