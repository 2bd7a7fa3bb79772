"""Lightning indexer, prefill: FP8 logits of every query against the tokens of its window.

``weighted_relu``: ``I[t,s] = Σ_j w[t,j] · ReLU(q[t,j] · k[s])``; ``relu_bias``: ``I[t,s] = Σ_j ReLU(q[t,j] · k[s] + w[t,j])``
with ``k[s]`` dequantised by its token's scale (DeepSeek-V3.2-Exp report, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, compare
from ..draw import Draw
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..presets import SCORES, Model
from ..values import Scalar, Sizes, Spec

LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW_ALIGNMENT = 128  # elements; rows of logits start on cache lines, so that neighbouring tiles never share one


@dataclass(frozen=True)
class IndexerSpec(Spec):
    """What changes the indexer's code."""

    heads: int
    head_dim: int
    score: str = "weighted_relu"
    logits: str = "fp32"
    clean: bool = False
    """Whether columns outside a query's window are written as -inf (otherwise they are left as they are)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("heads", (8, 16, 32, 64))
        self.require_in("head_dim", (32, 64, 128))
        self.require_in("score", SCORES)
        self.require_in("logits", LOGITS)


@dataclass(frozen=True)
class IndexerSizes(Sizes):
    """What varies from call to call."""

    queries: int
    context: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"queries": (1025,), "context": (16385,)}


class Indexer(Op[IndexerSpec, IndexerSizes]):
    """See the module's first lines."""

    name = "indexer"
    summary = "FP8 lightning indexer: logits of every query against the tokens of its window [start, end)."
    function = "indexer_logits"
    schema = (
        "(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, "
        "str score='weighted_relu', str logits='fp32', bool clean=False) -> Tensor"
    )
    spec_type = IndexerSpec
    sizes_type = IndexerSizes
    backends = ("triton",)
    min_capability = 89

    def from_model(self, model: Model) -> IndexerSpec:
        return IndexerSpec(model.index_heads, model.index_head_dim, model.score)

    def bind(self, *args: Any) -> tuple[IndexerSpec, IndexerSizes, Inputs]:
        q, k, k_scale, weights, starts, ends, score, logits, clean = args
        checks.one_of("score", score, SCORES)
        checks.one_of("logits", logits, tuple(LOGITS))
        q = checks.tensor("q", q, (None, None, None), checks.FP8)
        queries, heads, head_dim = q.shape
        tokens = checks.tensor("k", k, (None, head_dim), checks.FP8, like=q).shape[0]
        checks.tensor("k_scale", k_scale, (tokens,), torch.float32, like=q)
        checks.tensor("weights", weights, (queries, heads), torch.float32, like=q)
        checks.tensor("starts", starts, (queries,), torch.int32, like=q)
        checks.tensor("ends", ends, (queries,), torch.int32, like=q)
        inputs = {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": ends}
        return IndexerSpec(heads, head_dim, score, logits, clean), IndexerSizes(queries, tokens), inputs

    def inputs(self, spec: IndexerSpec, case: Case[IndexerSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.context
        key = draw.normal(tokens, spec.head_dim)
        k_scale = key.abs().amax(-1).clamp(min=1e-4) / 448
        starts, ends = _windows(case, draw)
        return {
            "q": draw.normal(queries, spec.heads, spec.head_dim, dtype=checks.FP8),
            "k": (key / k_scale[:, None]).to(checks.FP8),
            "k_scale": k_scale,
            "weights": draw.normal(queries, spec.heads, scale=(spec.heads * spec.head_dim) ** -0.5),
            "starts": starts,
            "ends": ends,
        }

    def reference(self, spec: IndexerSpec, inputs: Inputs) -> Outputs:
        q, weights = inputs["q"].float(), inputs["weights"]
        key = inputs["k"].float() * inputs["k_scale"][:, None]
        logits = torch.zeros(len(q), len(key), device=q.device)
        for head in range(spec.heads):  # head by head: all at once would take heads × queries × tokens floats
            dots = q[:, head] @ key.T
            if spec.score == "weighted_relu":
                logits += weights[:, head, None] * dots.relu()
            else:
                logits += (dots + weights[:, head, None]).relu()
        return {"logits": logits.masked_fill(~inside(inputs), -math.inf)}

    def allocate(self, spec: IndexerSpec, inputs: Inputs) -> Outputs:
        queries, tokens = inputs["q"].shape[0], inputs["k"].shape[0]
        stride = -(-tokens // ROW_ALIGNMENT) * ROW_ALIGNMENT
        rows = torch.empty(queries, stride, dtype=LOGITS[spec.logits], device=inputs["q"].device)
        return {"logits": rows[:, :tokens]}

    def check(self, spec: IndexerSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        logits = outputs["logits"]
        if not spec.clean:  # outside the windows nothing is promised
            logits = logits.masked_fill(~inside(inputs), -math.inf)
        limit = compare.LOGITS if spec.logits == "fp32" else compare.LOGITS_BF16
        return compare.close("logits", logits, reference["logits"], limit)

    def cost(self, spec: IndexerSpec, case: Case[IndexerSizes]) -> Cost:
        queries, context = case.sizes.queries, case.sizes.context
        pairs = queries * context - queries * (queries - 1) // 2
        operands = (queries * spec.heads + context) * spec.head_dim + 4 * queries * spec.heads + 4 * context
        return Cost(2 * pairs * spec.heads * spec.head_dim, operands + LOGITS[spec.logits].itemsize * pairs, "fp8")

    def cases(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        sizes = ((1, 1), (5, 77), (13, 300), (3, 0), (0, 40))
        ragged = [Case(IndexerSizes(queries, context), "ragged") for queries, context in sizes]
        return [Case(IndexerSizes(33, 130), "causal"), *ragged]

    def options(self, spec: IndexerSpec) -> Sequence[IndexerSpec]:
        changes: tuple[dict[str, Any], ...] = ({}, {"clean": True}, {"logits": "bf16"}, {"score": "relu_bias", "clean": True})
        return tuple(replace(spec, **change) for change in changes)

    def workloads(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        sizes = ((4096, 32768), (4096, 8192), (512, 8192), (512, 32768))
        return [Case(IndexerSizes(queries, context), "causal") for queries, context in sizes]

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_q", (1, 2, 4, 8, 16), "queries per block"),
            Parameter("block_n", (32, 64, 128, 256), "tokens per tile, the M operand of the matrix product"),
            Parameter("num_warps", (4, 8), "warps per block"),
            Parameter("num_stages", (2, 3, 4, 5), "tiles of keys in flight"),
            Parameter("splits", (1, 2, 4, 8), "blocks that share the window of a query block", launch_only=True),
        )

    def constraints(self, spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        columns = config["block_q"] * spec.heads
        threads = 32 * config["num_warps"]
        smem = (columns + config["num_stages"] * config["block_n"]) * spec.head_dim
        yield from exceeds("columns", columns, 256)
        yield from exceeds("columns", 16, columns)
        yield from exceeds("warpgroup rows", config["num_warps"] * 16, config["block_n"])
        # The accumulator lies in registers; beyond 192 of 255 the epilogue spills.
        yield from exceeds("accumulator registers", config["block_n"] * columns / threads, 192)
        yield from exceeds("smem", smem, gpu.smem_per_block, " B")

    def default_config(self, spec: IndexerSpec, sizes: IndexerSizes, gpu: Gpu) -> Config:
        # 1085 TFLOPS at 64 heads on the H200: several blocks per SM, one's epilogue behind another's products.
        blocks = -(-sizes.queries // max(1, 256 // spec.heads))
        splits = next((s for s in (1, 2, 4) if s * blocks >= 4 * gpu.sms), 8)
        return Config.of("triton", block_q=min(16, 256 // spec.heads), block_n=64, num_warps=4, num_stages=3, splits=splits)

    def derived(self, spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
        return {"columns": config["block_q"] * spec.heads}

    def launches(self, spec: IndexerSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, k, logits = inputs["q"], inputs["k"], outputs["logits"]
        queries, tokens = q.shape[0], k.shape[0]
        if not queries or not tokens:
            return ()
        tensors = (q, k, inputs["k_scale"], inputs["weights"], inputs["starts"], inputs["ends"], logits)
        grid = (-(-queries // config["block_q"]), config["splits"], 1)
        return (Launch("indexer", grid, (*tensors, queries, tokens, logits.stride(0))),)


def inside(inputs: Inputs) -> Tensor:
    """bool [queries, tokens]: the token lies in the query's window."""
    token = torch.arange(inputs["k"].shape[0], device=inputs["k"].device)
    return (token >= inputs["starts"][:, None]) & (token < inputs["ends"][:, None])


def _windows(case: Case[IndexerSizes], draw: Draw) -> tuple[Tensor, Tensor]:
    """(starts, ends): the last queries of a causal context, or windows of any place and length, some of them empty."""
    queries, tokens = case.sizes.queries, case.sizes.context
    if case.distribution == "causal":
        ends = torch.arange(tokens - queries + 1, tokens + 1, device=draw.device, dtype=torch.int32).clamp(min=0)
        return torch.zeros_like(ends), ends
    starts = draw.integers(-2, tokens, queries)
    lengths = draw.integers(-tokens // 4, tokens + 3, queries)
    return starts, starts + lengths


OP = Indexer()
