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
from ..tma import Tiled
from ..values import Scalar, Sizes, Spec
from ..waves import share_out

LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GLUON_COLUMNS = 256  # queries × heads of a block
_ROW_ALIGNMENT = 128  # elements of a row of logits


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
    backends = ("gluon", "triton", "tilelang")
    minor = frozenset({"clean", "score"})
    min_capability = 89

    def specs(self, model: Model) -> Sequence[IndexerSpec]:
        return (IndexerSpec(model.index_heads, model.index_head_dim, model.score),)

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
        return {"logits": empty_logits(queries, tokens, spec.logits, inputs["q"].device)}

    def check(self, spec: IndexerSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        logits = outputs["logits"]
        if not spec.clean:  # outside the windows nothing is promised
            logits = logits.masked_fill(~inside(inputs), -math.inf)
        return compare.close("logits", logits, reference["logits"], compare.LOGITS)

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
        if backend == "gluon":
            return (
                Parameter("accumulators", (1, 2), "products in flight: one at a time, or two that take turns"),
                Parameter("block_n", (64, 128), "tokens per stage of keys, in tiles of 64"),
                Parameter("num_stages", (2, 3, 4, 5, 6, 8), "stages of keys in flight"),
                Parameter("blocks_per_sm", (2, 3), "resident blocks: registers are capped and waves counted for so many"),
            )
        tiles = (
            Parameter("block_q", (1, 2, 4, 8, 16), "queries per block"),
            Parameter("block_n", (32, 64, 128, 256), "tokens per tile, the M operand of the matrix product"),
            Parameter("num_stages", (2, 3, 4, 5), "tiles of keys in flight"),
            Parameter("splits", (1, 2, 4, 8), "blocks that share the window of a query block", launch_only=True),
        )
        if backend == "triton":
            return (*tiles, Parameter("num_warps", (4, 8), "warps per block"))
        return (
            *tiles,
            Parameter(
                "pipeline", ("plain", "paired"), "one tile at a time, or the second of a pair behind the first's epilogue"
            ),
            Parameter("threads", (128, 256), "threads per block; warp groups share out a tile's tokens, or else its queries"),
            Parameter("blocks_per_sm", (1, 2, 3, 4), "blocks that the registers of a thread must leave room for"),
        )

    def constraints(self, spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "gluon":
            yield from _gluon_constraints(spec, config, gpu)
            return
        columns = config["block_q"] * spec.heads
        smem = (columns + config["num_stages"] * config["block_n"]) * spec.head_dim
        yield from exceeds("smem", smem + 2048, gpu.smem_per_block, " B")  # barriers and what is reserved
        yield from exceeds("columns", 16, columns)
        if config.backend == "tilelang":
            yield from _tilelang_constraints(spec, config, gpu)
            return
        yield from exceeds("columns", columns, 256)
        yield from exceeds("warpgroup rows", config["num_warps"] * 16, config["block_n"])
        # The accumulator lies in registers; beyond 192 of 255 the epilogue spills.
        yield from exceeds("accumulator registers", config["block_n"] * columns / (32 * config["num_warps"]), 192)

    def default_config(self, spec: IndexerSpec, sizes: IndexerSizes, gpu: Gpu) -> Config:
        # One accumulator and three blocks per SM; with 8 heads 184 bytes would be spilled: 518 µs, not 262.
        accumulators, resident = (2, 2) if spec.heads == 8 else (1, 3)
        hopper = Config.of("gluon", accumulators=accumulators, block_n=64, num_stages=3, blocks_per_sm=resident)
        blocks = -(-sizes.queries // max(1, 256 // spec.heads))
        splits = next((s for s in (1, 2, 4) if s * blocks >= 4 * gpu.sms), 8)
        plain = Config.of("triton", block_q=min(16, 256 // spec.heads), block_n=64, num_warps=4, num_stages=3, splits=splits)
        for config in (hopper, plain):
            if not self.violations(spec, config, gpu):
                return config
        return self.seed_config(spec, "triton", gpu)

    def derived(self, spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
        if config.backend == "gluon":
            return _gluon_numbers(spec, config)
        columns: dict[str, Scalar] = {"columns": config["block_q"] * spec.heads}
        if config.backend == "triton":
            return columns
        split_q = _query_groups(config)
        policy = "FullRow" if split_q == 1 else "FullCol"
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[spec.logits]
        return {**columns, "split_q": split_q, "group_q": config["block_q"] // split_q, "policy": policy, "dtype": dtype}

    def launches(self, spec: IndexerSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, k, logits = inputs["q"], inputs["k"], outputs["logits"]
        queries, tokens = q.shape[0], k.shape[0]
        if not queries or not tokens:
            return ()
        if config.backend == "gluon":
            blocks = -(-queries * spec.heads // _GLUON_COLUMNS)
            whole, splits = share_out(blocks, config["blocks_per_sm"] * gpu.sms, -(-tokens // config["block_n"]))
            rest = (inputs["k_scale"], inputs["weights"], inputs["starts"], inputs["ends"], logits)
            scalars = (queries, tokens, logits.stride(0), whole, splits)
            return (Launch("indexer", (whole + (blocks - whole) * splits, 1, 1), (q, Tiled(k), *rest, *scalars)),)
        tensors = (q, k, inputs["k_scale"], inputs["weights"], inputs["starts"], inputs["ends"], logits)
        grid = (-(-queries // config["block_q"]), config["splits"], 1)
        if config.backend == "tilelang":
            return (Launch("indexer", grid, (*tensors, config["splits"])),)
        return (Launch("indexer", grid, (*tensors, queries, tokens, logits.stride(0))),)


def empty_logits(rows: int, columns: int, dtype: str, device: torch.device) -> Tensor:
    """Uninitialised logits [rows, columns] whose rows start on cache lines, so that neighbouring tiles never share one."""
    stride = -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    return torch.empty(rows, stride, dtype=LOGITS[dtype], device=device)[:, :columns]


def inside(inputs: Inputs) -> Tensor:
    """bool [queries, tokens]: the token lies in the query's window."""
    token = torch.arange(inputs["k"].shape[0], device=inputs["k"].device)
    return (token >= inputs["starts"][:, None]) & (token < inputs["ends"][:, None])


def _gluon_constraints(spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("wgmma", 1.0, f"wgmma: the template is written for Hopper (sm_90), {gpu.name} is sm_{gpu.capability}")
    smem = (_GLUON_COLUMNS + config["num_stages"] * config["block_n"]) * spec.head_dim + 8 * config["num_stages"]
    yield from exceeds("smem", config["blocks_per_sm"] * (smem + 1024), gpu.smem_per_sm, " B")  # 1024: the system's own
    # Products, weights, and a window and an address for each of a thread's queries; ptxas reported up to 8 above that.
    registers = 64 * config["accumulators"] + 64 + 4 * (64 // spec.heads) + 20
    yield from exceeds("registers", registers, _gluon_registers(config))
    # Where the tiles of a stage follow each other without a loop, ptxas spills unless all that a thread holds is at its least.
    plain = config["accumulators"] == 2 and spec.heads in (8, 32) and not spec.clean and spec.score == "weighted_relu"
    yield from exceeds("tiles of a stage", config["block_n"] // 64, 2 if plain else 1)


def _gluon_registers(config: Config) -> int:
    """The cap per thread that leaves room for the config's resident blocks in Hopper's register file of 65536."""
    return {2: 255, 3: 168}[config["blocks_per_sm"]]


def _gluon_numbers(spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
    """Names for the Gluon template: how a block's columns come in two parts, and the layouts that follow from it."""
    part_heads = min(spec.heads, 32)
    part_queries = 4 * (32 // part_heads)  # four lanes share a row of the accumulator; each holds 32 columns: its queries
    query_parts = _GLUON_COLUMNS // spec.heads // part_queries
    next_queries = [[0, 4 << bit] for bit in range((part_queries // 4).bit_length() - 1)]
    return {
        "block_q": part_queries * query_parts,
        "tiles": config["block_n"] // 64,
        "part_heads": part_heads,
        "part_queries": part_queries,
        "query_parts": query_parts,
        "next_query": part_queries if query_parts == 2 else 0,
        "next_head": 0 if query_parts == 2 else part_heads,
        "score_registers": str([[8, 0], *next_queries]),
        "row_lanes": str([512 // spec.head_dim, spec.head_dim // 16]),
        "maxnreg": _gluon_registers(config),
    }


def _query_groups(config: Config) -> int:
    """Among how many warp groups a block's queries are shared out: 1 where a tile has 64 tokens for each group."""
    return 1 if config["threads"] // 2 <= config["block_n"] else config["threads"] // 128


def _tilelang_constraints(spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    groups = _query_groups(config)
    queries = config["block_q"] / groups
    columns = queries * spec.heads
    if gpu.capability != 90:
        yield Violation(
            "wgmma", 1.0, f"wgmma: the template multiplies as Hopper (sm_90) does, {gpu.name} is sm_{gpu.capability}"
        )
    yield from exceeds("warp groups", groups, config["block_q"])
    if config["pipeline"] == "paired":  # TileLang finds no layout for two accumulators of a single query
        yield from exceeds("queries of a pair", 2, config["block_q"])
    yield from exceeds("warpgroup rows", 64, config["block_n"])
    yield from exceeds("columns", columns, 256)
    # Products (of two tiles when paired), weights, windows and sums per thread; what ptxas reported is at most 20 above that.
    rows = config["block_n"] * groups * 128 / config["threads"] / 64
    products = rows * columns / 2 * (2 if config["pipeline"] == "paired" else 1)
    registers = products + columns / 4 + 2 * queries + rows * queries + 12
    yield from exceeds(
        "registers", registers, min(gpu.regs_per_thread, gpu.regs_per_sm / config["threads"] / config["blocks_per_sm"])
    )


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
