"""Lightning indexer, decode: logits of each sequence's newest queries against its paged key cache, FP8 or unquantised.

The scores are those of the prefill indexer (``weighted_relu``, ``relu_bias``); query ``i`` of sequence ``b`` sees the tokens
``0 … lengths[b, i] - 1``, which lie in the cache blocks that row ``b`` of the page table names.
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
from ...problem.caches import IndexKLayout, valid_slots
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.paged import check_keys
from ...problem.presets import PRECISIONS, SCORES, Model
from ...problem.quantization import quantize_groups
from ...problem.values import Sizes, Spec
from .. import ordered
from ..logits import LOGITS, empty_logits, exact, whole_weights

_LONGEST = 1 << 30  # tokens of a context: kernels look some stages ahead in 32 bits


@dataclass(frozen=True)
class IndexerPagedSpec(Spec):
    """What changes the paged indexer's code."""

    heads: int
    head_dim: int
    next_n: int = 1
    """Queries per sequence: 1, or more with multi-token prediction."""
    page: int = 64
    score: str = "weighted_relu"
    logits: str = "fp32"
    clean: bool = False
    """Whether columns at or beyond a query's length are written as -inf (otherwise they are left as they are)."""
    scores: str = "fp8"
    """Whether queries and keys are e4m3, the keys with scales, or bf16 without any."""
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, channels.MOST_INDEX_HEADS)
        self.require_in("head_dim", channels.INDEX_WIDTHS)
        self.require_range("next_n", 1, 8)
        self.require_in("page", (16, 32, 64, 128, 256))
        self.require_in("score", SCORES)
        self.require_in("logits", LOGITS)
        self.require_in("scores", PRECISIONS)

    @property
    def layout(self) -> IndexKLayout:
        """How a block of the cache is laid out."""
        return IndexKLayout(self.page, self.head_dim)


@dataclass(frozen=True)
class IndexerPagedSizes(Sizes):
    """What varies from call to call."""

    batch: int
    context: int
    """Columns of the logits: the longest length that any query may have."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"batch": (2, 17, 129), "context": (4097, 7169, 16385)}


class IndexerPagedProblem(Problem[IndexerPagedSpec, IndexerPagedSizes]):
    """See the module's first lines."""

    name = "indexer_paged"
    summary = "Lightning indexer over a paged key cache: logits of the newest queries of each sequence."
    function = "indexer_logits_paged"
    schema = (
        "(Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor page_table, SymInt max_context, "
        "str score='weighted_relu', str logits='fp32', bool clean=False, str scores='fp8', "
        "bool batch_invariant=False) -> Tensor"
    )
    spec_type = IndexerPagedSpec
    sizes_type = IndexerPagedSizes
    minor = frozenset({"clean", "score", "page", "batch_invariant"})

    def specs_of(self, model: Model) -> Sequence[IndexerPagedSpec]:
        shape = model.index_heads, model.index_head_dim
        options: dict[str, Any] = {"page": model.page, "score": model.score, "scores": model.index_scores}
        plain = IndexerPagedSpec(*shape, **options, batch_invariant=model.invariant)
        return tuple(replace(plain, next_n=queries) for queries in dict.fromkeys((1, model.next_n)))

    def bind(self, *args: Any) -> tuple[IndexerPagedSpec, IndexerPagedSizes, Inputs]:
        q, cache, weights, lengths, page_table, max_context, score, logits, clean, scores, invariant = args
        checks.one_of("score", score, SCORES)
        checks.one_of("logits", logits, tuple(LOGITS))
        q, page = check_keys(q, cache, scores)
        batch, next_n, heads, head_dim = q.shape
        whole = whole_weights(heads)
        weights = checks.rows("weights", weights, (batch * next_n, heads), torch.float32, like=q, whole=whole)
        lengths = checks.tensor("lengths", lengths, (batch, next_n), torch.int32, like=q)
        page_table = checks.tensor("page_table", page_table, (batch, None), torch.int32, like=q, inner_contiguous=True)
        if not 0 <= max_context <= _LONGEST:
            raise InputError("max_context", max_context, f"0 to {_LONGEST}")
        inputs = {"q": q, "cache": cache, "weights": weights, "lengths": lengths, "page_table": page_table}
        spec = IndexerPagedSpec(heads, head_dim, next_n, page, score, logits, clean, scores, invariant)
        return spec, IndexerPagedSizes(batch, max_context), {**inputs, "max_context": max_context}

    def inputs(self, spec: IndexerPagedSpec, case: Case[IndexerPagedSizes], draw: Draw) -> Inputs:
        batch, context = case.sizes.batch, case.sizes.context
        max_pages = -(-context // spec.page)
        blocks = batch * max_pages + 1
        page_table = draw.permutation(blocks)[: batch * max_pages].view(batch, max_pages).int()
        lengths = torch.full((batch, spec.next_n), context, dtype=torch.int32, device=draw.device)
        if case.distribution == "ragged":
            lengths = draw.integers(-3, context + 1, batch, 1) - torch.arange(spec.next_n, device=draw.device)
            lengths = lengths.clamp(min=0).int()
            absent = draw.uniform(batch, max_pages) < 0.1
            page_table = page_table.masked_fill(absent, -1).masked_fill(draw.uniform(batch, max_pages) < 0.05, blocks)
        dtype = checks.FP8 if spec.scores == "fp8" else torch.bfloat16
        return {
            "q": draw.normal(batch, spec.next_n, spec.heads, spec.head_dim, dtype=dtype),
            "cache": _cache(spec, blocks, draw),
            "weights": draw.normal(batch * spec.next_n, spec.heads, scale=(spec.heads * spec.head_dim) ** -0.5),
            "lengths": lengths,
            "page_table": page_table,
            "max_context": context,
        }

    def reference(self, spec: IndexerPagedSpec, inputs: Inputs) -> Outputs:
        q, page_table, context = inputs["q"], inputs["page_table"], inputs["max_context"]
        weights = inputs["weights"].view(*q.shape[:2], spec.heads)
        logits = torch.full((*q.shape[:2], context), -math.inf, dtype=torch.float32, device=q.device)
        for row in range(len(q)):
            if spec.batch_invariant:
                keys, scales, present = _stored_keys(spec, inputs["cache"], page_table[row], context)
                score = ordered.scores(q[row], keys, scales, weights[row], spec.score)
                logits[row, :, : len(keys)] = score.masked_fill(~present, -math.inf)
                continue
            key, present = _keys(spec, inputs["cache"], page_table[row], context)
            for query in range(spec.next_n):
                dots = exact(q[row, query]) @ key.T
                weight = weights[row, query, :, None]
                score = (dots.relu() * weight if spec.score == "weighted_relu" else (dots + weight).relu()).sum(0)
                logits[row, query, : len(key)] = score.masked_fill(~present, -math.inf)
        return {"logits": logits.flatten(0, 1).masked_fill(~inside(inputs), -math.inf)}

    def allocate(self, spec: IndexerPagedSpec, inputs: Inputs) -> Outputs:
        q, context = inputs["q"], inputs["max_context"]
        return {"logits": empty_logits(q.shape[0] * spec.next_n, context, spec.logits, q.device)}

    def check(self, spec: IndexerPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        logits = outputs["logits"]
        if not spec.clean:  # beyond the lengths nothing is promised
            logits = logits.masked_fill(~inside(inputs), -math.inf)
        return compare.close("logits", logits, reference["logits"], compare.LOGITS)

    def cost(self, spec: IndexerPagedSpec, case: Case[IndexerPagedSizes]) -> Cost:
        batch, tokens = case.sizes.batch, case.sizes.batch * case.sizes.context
        pairs = tokens * spec.next_n
        queries = batch * spec.next_n * spec.heads * (spec.head_dim + 4)
        stored = spec.head_dim + 4 if spec.scores == "fp8" else 2 * spec.head_dim
        moved = tokens * stored + queries + LOGITS[spec.logits].itemsize * pairs
        return Cost(2 * pairs * spec.heads * spec.head_dim, moved, spec.scores)

    def cases(self, spec: IndexerPagedSpec) -> Sequence[Case[IndexerPagedSizes]]:
        sizes = ((5, 300), (1, 129), (7, 5), (3, 0), (0, 40))
        ragged = [Case(IndexerPagedSizes(batch, context), "ragged") for batch, context in sizes]
        return [Case(IndexerPagedSizes(2, 260), "full"), *ragged]

    def long_cases(self, spec: IndexerPagedSpec) -> Sequence[Case[IndexerPagedSizes]]:
        sizes = ((48, 9000), (2, 40000), (700, 300), (20, 17000), (1, 1 << 20))
        return [Case(IndexerPagedSizes(batch, context), "ragged") for batch, context in sizes]

    def options(self, spec: IndexerPagedSpec) -> Sequence[IndexerPagedSpec]:
        changes: tuple[dict[str, Any], ...] = (
            {},
            {"next_n": 2, "clean": True},
            {"next_n": 3, "logits": "bf16"},
            {"next_n": 6, "score": "relu_bias", "clean": True},
            {"next_n": 4, "page": 32},
            {"page": 128, "clean": True},
            {"scores": "bf16", "next_n": 2},
            {"scores": "bf16", "score": "relu_bias", "page": 128, "clean": True},
        )
        return tuple(replace(spec, **change) for change in changes)

    def workloads(self, spec: IndexerPagedSpec) -> Sequence[Case[IndexerPagedSizes]]:
        sizes = ((64, 65536), (8, 65536), (1, 65536), (256, 8192), (64, 8192), (8, 8192), (1, 8192), (600, 512), (300, 6000))
        return [Case(IndexerPagedSizes(batch, context), "full") for batch, context in sizes]


def inside(inputs: Inputs) -> Tensor:
    """bool [batch × next_n, max_context]: the token lies below the query's length."""
    token = torch.arange(inputs["max_context"], device=inputs["q"].device)
    return token < inputs["lengths"].flatten()[:, None]


def _cache(spec: IndexerPagedSpec, blocks: int, draw: Draw) -> Tensor:
    """Normal keys; quantised ones a part of the blocks at a time: all in fp32 would take four times the cache."""
    if spec.scores != "fp8":
        return draw.normal(blocks, spec.page, 1, spec.head_dim, dtype=torch.bfloat16)
    cache = spec.layout.empty(blocks, draw.device)
    if draw.device == "meta":
        return cache
    step = max(1, (1 << 22) // spec.page)
    for first in range(0, blocks, step):
        slots = torch.arange(first * spec.page, min(first + step, blocks) * spec.page, device=draw.device)
        keys, scales = quantize_groups(draw.normal(len(slots), spec.head_dim), spec.head_dim)
        spec.layout.pack(cache, slots, keys, scales[:, 0])
    return cache


def _stored_keys(spec: IndexerPagedSpec, cache: Tensor, pages: Tensor, context: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """``_keys`` as they are stored: e4m3 [n, head_dim] and scales [n], or unquantised without; and which lie in the cache."""
    if spec.scores != "fp8" or not len(cache):
        key, present = _keys(spec, cache, pages, context)
        return key, None, present
    place = torch.arange(spec.page, device=pages.device)
    present = valid_slots(pages, len(cache)).repeat_interleave(spec.page)[:context]
    slots = (pages.long()[:, None] * spec.page + place).flatten()[:context]
    keys, scales = spec.layout.unpack(cache, slots.masked_fill(~present, 0))
    return keys, scales.flatten(), present


def _keys(spec: IndexerPagedSpec, cache: Tensor, pages: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """fp32 (fp64 where they came so) keys [n, head_dim] of one row's pages, and whether each lies in the cache [n]."""
    place = torch.arange(spec.page, device=pages.device)
    present = valid_slots(pages, len(cache)).repeat_interleave(spec.page)[:context]
    slots = (pages.long()[:, None] * spec.page + place).flatten()[:context]
    if not len(cache):
        return torch.zeros(len(slots), spec.head_dim, dtype=torch.float32, device=pages.device), present
    if spec.scores != "fp8":
        blocks = cache[torch.where(valid_slots(pages, len(cache)), pages, 0).long(), :, 0]
        return exact(blocks).flatten(0, 1)[:context], present
    return spec.layout.dequantize(cache, slots.masked_fill(~present, 0)), present
