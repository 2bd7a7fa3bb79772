"""Lightning indexer, prefill: logits of every query against the tokens of its window, in FP8 or of unquantised operands.

``weighted_relu``: ``I[t,s] = Σ_j w[t,j] · ReLU(q[t,j] · k[s])``; ``relu_bias``: ``I[t,s] = Σ_j ReLU(q[t,j] · k[s] + w[t,j])``
with ``k[s]`` dequantised by its token's scale (DeepSeek-V3.2-Exp report, equation 1). ReLU keeps NaN: a broken key, scale or
query shows in its scores.
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
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import PRECISIONS, SCORES, Model
from ...problem.values import Sizes, Spec
from .. import ordered
from ..logits import LOGITS, empty_logits, exact, whole_weights

_MOST_TOKENS = 1 << 30  # also what a selection takes; a tile behind the last token stays below 2^31
_EDGES = (-(1 << 31), -1, 0, 5, 77, 128, (1 << 31) - 1)  # of windows that a caller may pass, sensible or not


@dataclass(frozen=True)
class IndexerSpec(Spec):
    """What changes the indexer's code."""

    heads: int
    head_dim: int
    score: str = "weighted_relu"
    logits: str = "fp32"
    clean: bool = False
    """Whether columns outside a query's window are written as -inf (otherwise they are left as they are)."""
    compressed: bool = False
    """Whether column 0 of a row is the first token of its query's window (otherwise it is token 0)."""
    scores: str = "fp8"
    """Whether queries and keys are e4m3, the keys with scales, or bf16 without any."""
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, channels.MOST_INDEX_HEADS)
        self.require_in("head_dim", channels.INDEX_WIDTHS)
        self.require_in("score", SCORES)
        self.require_in("logits", LOGITS)
        self.require_in("scores", PRECISIONS)


@dataclass(frozen=True)
class IndexerSizes(Sizes):
    """What varies from call to call."""

    queries: int
    context: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"queries": (65, 1025), "context": (16385,)}


class IndexerProblem(Problem[IndexerSpec, IndexerSizes]):
    """See the module's first lines."""

    name = "indexer"
    summary = "Lightning indexer: logits of every query against the tokens of its window [start, end)."
    function = "indexer_logits"
    schema = (
        "(Tensor q, Tensor k, Tensor? k_scale, Tensor weights, Tensor starts, Tensor ends, "
        "str score='weighted_relu', str logits='fp32', bool clean=False, SymInt? max_window=None, str scores='fp8', "
        "bool batch_invariant=False) -> Tensor"
    )
    spec_type = IndexerSpec
    sizes_type = IndexerSizes
    minor = frozenset({"clean", "score", "compressed", "batch_invariant"})

    def specs_of(self, model: Model) -> Sequence[IndexerSpec]:
        shape = model.index_heads, model.index_head_dim, model.score
        return (IndexerSpec(*shape, scores=model.index_scores, batch_invariant=model.invariant),)

    def bind(self, *args: Any) -> tuple[IndexerSpec, IndexerSizes, Inputs]:
        q, k, k_scale, weights, starts, ends, score, logits, clean, max_window, scores, invariant = args
        checks.one_of("score", score, SCORES)
        checks.one_of("logits", logits, tuple(LOGITS))
        checks.one_of("scores", scores, PRECISIONS)
        q = checks.rows("q", q, (None, None, None), checks.FP8 if scores == "fp8" else checks.floating(q))
        queries, heads, head_dim = q.shape
        k = checks.rows("k", k, (None, head_dim), q.dtype, like=q)
        tokens = k.shape[0]
        k_scale = _scales(k_scale, scores, tokens, q)
        whole = whole_weights(heads)
        weights = checks.rows("weights", weights, (queries, heads), torch.float32, like=q, whole=whole)
        starts = checks.tensor("starts", starts, (queries,), torch.int32, like=q)
        ends = checks.tensor("ends", ends, (queries,), torch.int32, like=q)
        if tokens > _MOST_TOKENS:
            raise InputError("k", f"{tokens} tokens", f"at most {_MOST_TOKENS}")
        inputs = {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": ends}
        compressed = max_window is not None
        if compressed:
            if not 0 <= max_window <= _MOST_TOKENS:
                raise InputError("max_window", max_window, f"None, or 0 to {_MOST_TOKENS}")
            inputs["max_window"] = max_window
        spec = IndexerSpec(heads, head_dim, score, logits, clean, compressed, scores, invariant)
        return spec, IndexerSizes(queries, tokens), inputs

    def inputs(self, spec: IndexerSpec, case: Case[IndexerSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.context
        key = draw.normal(tokens, spec.head_dim)
        quantised = spec.scores == "fp8"
        k_scale = key.abs().amax(-1).clamp(min=1e-4) / 448 if quantised else None
        starts, ends = _windows(case, draw)
        # Some windows of the cases that are not causal are longer.
        longest = {"max_window": tokens if case.distribution == "causal" else tokens * 2 // 3} if spec.compressed else {}
        return {
            "q": draw.normal(queries, spec.heads, spec.head_dim, dtype=checks.FP8 if quantised else torch.bfloat16),
            "k": key.bfloat16() if k_scale is None else (key / k_scale[:, None]).to(checks.FP8),
            "k_scale": k_scale,
            "weights": draw.normal(queries, spec.heads, scale=(spec.heads * spec.head_dim) ** -0.5),
            "starts": starts,
            "ends": ends,
            **longest,
        }

    def reference(self, spec: IndexerSpec, inputs: Inputs) -> Outputs:
        q, k, k_scale, weights = (inputs[name] for name in ("q", "k", "k_scale", "weights"))
        if spec.batch_invariant:
            logits = ordered.scores(q, k, k_scale, weights, spec.score)
        else:
            key = exact(k) if k_scale is None else exact(k) * k_scale[:, None]
            logits = _scores(exact(q), key, weights, spec.score)
        if spec.compressed:
            start, _ = windows(inputs)
            token = start[:, None].long() + torch.arange(inputs["max_window"], device=q.device)
            logits = torch.nn.functional.pad(logits, (0, 1)).gather(1, token.clamp(max=len(k)))
        return {"logits": logits.masked_fill(~inside(inputs), -math.inf)}

    def allocate(self, spec: IndexerSpec, inputs: Inputs) -> Outputs:
        return {"logits": empty_logits(inputs["q"].shape[0], columns_of(inputs), spec.logits, inputs["q"].device)}

    def check(self, spec: IndexerSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        logits = outputs["logits"]
        if not spec.clean:  # outside the windows nothing is promised
            logits = logits.masked_fill(~inside(inputs), -math.inf)
        return compare.close("logits", logits, reference["logits"], compare.LOGITS)

    def cost(self, spec: IndexerSpec, case: Case[IndexerSizes]) -> Cost:
        queries, context = case.sizes.queries, case.sizes.context
        pairs = queries * context - queries * (queries - 1) // 2
        width = 1 if spec.scores == "fp8" else 2
        operands = (queries * spec.heads + context) * spec.head_dim * width + 4 * queries * spec.heads
        operands += 4 * context if spec.scores == "fp8" else 0
        moved = operands + LOGITS[spec.logits].itemsize * pairs
        return Cost(2 * pairs * spec.heads * spec.head_dim, moved, spec.scores)

    def cases(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        sizes = ((1, 1), (5, 77), (13, 300), (3, 0), (0, 40))
        ragged = [Case(IndexerSizes(queries, context), "ragged") for queries, context in sizes]
        return [Case(IndexerSizes(33, 130), "causal"), Case(IndexerSizes(len(_EDGES) ** 2, 128), "extreme"), *ragged]

    def long_cases(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        return [Case(IndexerSizes(1500, 5000), "ragged"), Case(IndexerSizes(1700, 3000), "causal")]

    def options(self, spec: IndexerSpec) -> Sequence[IndexerSpec]:
        changes: tuple[dict[str, Any], ...] = ({}, {"clean": True}, {"logits": "bf16"}, {"score": "relu_bias", "clean": True})
        changes += ({"compressed": True}, {"compressed": True, "clean": True, "logits": "bf16"})
        changes += ({"scores": "bf16"}, {"scores": "bf16", "score": "relu_bias", "compressed": True})
        return tuple(replace(spec, **change) for change in changes)

    def workloads(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        sizes = ((4096, 32768), (4096, 8192), (512, 8192), (512, 32768))
        return [Case(IndexerSizes(queries, context), "causal") for queries, context in sizes]


def _scores(q: Tensor, key: Tensor, weights: Tensor, score: str) -> Tensor:
    """[queries, tokens] of q [queries, heads, head_dim] and dequantised keys [tokens, head_dim]."""
    logits = torch.zeros(len(q), len(key), dtype=q.dtype, device=q.device)
    for head in range(q.shape[1]):  # head by head: all at once would take heads × queries × tokens floats
        dots = q[:, head] @ key.T
        if score == "weighted_relu":
            logits += weights[:, head, None] * dots.relu()
        else:
            logits += (dots + weights[:, head, None]).relu()
    return logits


def windows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(start, end) of each query, int32 [queries], clamped to the tokens; an empty window starts where it ends."""
    end = inputs["ends"].clamp(0, inputs["k"].shape[0])
    return torch.minimum(inputs["starts"].clamp(min=0), end), end


def inside(inputs: Inputs) -> Tensor:
    """bool [queries, columns]: the column holds a token of the query's window."""
    start, end = windows(inputs)
    if "max_window" in inputs:
        start, end = torch.zeros_like(start), end - start
    column = torch.arange(columns_of(inputs), device=end.device)
    return (column >= start[:, None]) & (column < end[:, None])


def columns_of(inputs: Inputs) -> int:
    """Columns of the logits: the tokens, or as many as the caller has for the longest window."""
    return inputs.get("max_window", inputs["k"].shape[0])


def _scales(k_scale: object, scores: str, tokens: int, q: Tensor) -> Tensor | None:
    """The keys' scales, fp32 [tokens]; none where the keys are not quantised."""
    if scores == "fp8":
        return checks.tensor("k_scale", k_scale, (tokens,), torch.float32, like=q)
    if k_scale is not None:
        raise InputError("k_scale", type(k_scale).__name__, f"None with scores={scores!r}: nothing is quantised")
    return None


def _windows(case: Case[IndexerSizes], draw: Draw) -> tuple[Tensor, Tensor]:
    """(starts, ends): the last queries of a causal context, or windows of any place and length, empty or absurd ones too."""
    queries, tokens = case.sizes.queries, case.sizes.context
    if case.distribution == "causal":
        ends = torch.arange(tokens - queries + 1, tokens + 1, device=draw.device, dtype=torch.int32).clamp(min=0)
        return torch.zeros_like(ends), ends
    if case.distribution == "extreme":
        edges, number = torch.tensor(_EDGES, dtype=torch.int32, device=draw.device), torch.arange(queries, device=draw.device)
        return edges[number % len(_EDGES)], edges[number // len(_EDGES) % len(_EDGES)]
    starts = draw.integers(-2, tokens, queries)
    lengths = draw.integers(-tokens // 4, tokens + 3, queries)
    return starts, starts + lengths
