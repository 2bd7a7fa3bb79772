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
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..presets import SCORES, Model
from ..tma import Tiled
from ..values import Scalar, Sizes, Spec
from ..waves import share_out

LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GLUON_COLUMNS = 256  # queries × heads of a block
_ROW_ALIGNMENT = 128  # elements of a row of logits
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
        "str score='weighted_relu', str logits='fp32', bool clean=False, SymInt? max_window=None) -> Tensor"
    )
    spec_type = IndexerSpec
    sizes_type = IndexerSizes
    backends = ("gluon", "triton", "tilelang")
    minor = frozenset({"clean", "score", "compressed"})
    min_capability = 89

    def specs(self, model: Model) -> Sequence[IndexerSpec]:
        return (IndexerSpec(model.index_heads, model.index_head_dim, model.score),)

    def bind(self, *args: Any) -> tuple[IndexerSpec, IndexerSizes, Inputs]:
        q, k, k_scale, weights, starts, ends, score, logits, clean, max_window = args
        checks.one_of("score", score, SCORES)
        checks.one_of("logits", logits, tuple(LOGITS))
        q = checks.tensor("q", q, (None, None, None), checks.FP8)
        queries, heads, head_dim = q.shape
        tokens = checks.tensor("k", k, (None, head_dim), checks.FP8, like=q).shape[0]
        checks.tensor("k_scale", k_scale, (tokens,), torch.float32, like=q)
        checks.tensor("weights", weights, (queries, heads), torch.float32, like=q)
        checks.tensor("starts", starts, (queries,), torch.int32, like=q)
        checks.tensor("ends", ends, (queries,), torch.int32, like=q)
        if tokens > _MOST_TOKENS:
            raise InputError("k", f"{tokens} tokens", f"at most {_MOST_TOKENS}")
        inputs = {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": ends}
        compressed = max_window is not None
        if compressed:
            if not 0 <= max_window <= _MOST_TOKENS:
                raise InputError("max_window", max_window, f"None, or 0 to {_MOST_TOKENS}")
            inputs["max_window"] = max_window
        return IndexerSpec(heads, head_dim, score, logits, clean, compressed), IndexerSizes(queries, tokens), inputs

    def inputs(self, spec: IndexerSpec, case: Case[IndexerSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.context
        key = draw.normal(tokens, spec.head_dim)
        k_scale = key.abs().amax(-1).clamp(min=1e-4) / 448
        starts, ends = _windows(case, draw)
        # Some windows of the cases that are not causal are longer.
        longest = {"max_window": tokens if case.distribution == "causal" else tokens * 2 // 3} if spec.compressed else {}
        return {
            "q": draw.normal(queries, spec.heads, spec.head_dim, dtype=checks.FP8),
            "k": (key / k_scale[:, None]).to(checks.FP8),
            "k_scale": k_scale,
            "weights": draw.normal(queries, spec.heads, scale=(spec.heads * spec.head_dim) ** -0.5),
            "starts": starts,
            "ends": ends,
            **longest,
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
        if spec.compressed:
            start, _ = windows(inputs)
            token = start[:, None].long() + torch.arange(inputs["max_window"], device=q.device)
            logits = torch.nn.functional.pad(logits, (0, 1)).gather(1, token.clamp(max=len(key)))
        return {"logits": logits.masked_fill(~inside(inputs), -math.inf)}

    def allocate(self, spec: IndexerSpec, inputs: Inputs) -> Outputs:
        return {"logits": empty_logits(inputs["q"].shape[0], _columns(inputs), spec.logits, inputs["q"].device)}

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
        return [Case(IndexerSizes(33, 130), "causal"), Case(IndexerSizes(len(_EDGES) ** 2, 128), "extreme"), *ragged]

    def long_cases(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        return [Case(IndexerSizes(1500, 5000), "ragged"), Case(IndexerSizes(1700, 3000), "causal")]

    def options(self, spec: IndexerSpec) -> Sequence[IndexerSpec]:
        changes: tuple[dict[str, Any], ...] = ({}, {"clean": True}, {"logits": "bf16"}, {"score": "relu_bias", "clean": True})
        changes += ({"compressed": True}, {"compressed": True, "clean": True, "logits": "bf16"})
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

    def guesses(self, spec: IndexerSpec, sizes: IndexerSizes, gpu: Gpu) -> Iterable[Config]:
        # One accumulator and three blocks per SM, where that spills nothing.
        hopper = Config.of("gluon", accumulators=1, block_n=128, num_stages=2, blocks_per_sm=3)
        if spec.heads == 8:
            hopper = hopper.replace(accumulators=2, block_n=64, num_stages=4, blocks_per_sm=2)
        elif spec.heads == 16 and spec.clean and not spec.compressed:
            hopper = hopper.replace(block_n=64, num_stages=4)
        yield hopper
        columns = 256 if gpu.capability == 90 else 128  # where the operands lie in registers too, 256 spill 250 to 380 bytes
        block_q = min(16, columns // spec.heads)
        blocks = -(-sizes.queries // block_q)
        splits = next((s for s in (1, 2, 4) if s * blocks >= 4 * gpu.sms), 8)
        yield Config.of("triton", block_q=block_q, block_n=64, num_warps=4, num_stages=3, splits=splits)

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
        columns = _columns(inputs)
        if not queries or not columns:
            return ()
        if not tokens:  # of no keys no kernel can load a tile
            if spec.clean:
                logits.fill_(-math.inf)
            return ()
        width = (columns,) if spec.compressed else ()
        if config.backend == "gluon":
            blocks = -(-queries * spec.heads // _GLUON_COLUMNS)
            # The windows stay on the GPU: they are taken to be causal, as most are.
            window = min(tokens, columns)
            longest, shortest = -(-window // 64), max(window - queries, 0) // 64
            whole, splits = share_out(blocks, config["blocks_per_sm"] * gpu.sms, longest, shortest)
            pairs = Tiled(q, (spec.heads // 2, queries, 2, spec.head_dim), (2 * spec.head_dim, q.stride(0), spec.head_dim, 1))
            rest = (inputs["k_scale"], inputs["weights"], inputs["starts"], inputs["ends"], logits)
            scalars = (queries, tokens, logits.stride(0), whole, splits, *width)
            return (Launch("indexer", (whole + (blocks - whole) * splits, 1, 1), (pairs, Tiled(k), *rest, *scalars)),)
        tensors = (q, k, inputs["k_scale"], inputs["weights"], inputs["starts"], inputs["ends"], logits)
        grid = (-(-queries // config["block_q"]), config["splits"], 1)
        if config.backend == "tilelang":
            return (Launch("indexer", grid, (*tensors, config["splits"])),)
        return (Launch("indexer", grid, (*tensors, queries, tokens, logits.stride(0), *width)),)


def empty_logits(rows: int, columns: int, dtype: str, device: torch.device) -> Tensor:
    """Uninitialised logits [rows, columns] whose rows start on cache lines, so that neighbouring tiles never share one."""
    return torch.empty(rows, _stride(columns), dtype=LOGITS[dtype], device=device)[:, :columns]


def row_bytes(columns: int, dtype: str) -> int:
    """Bytes of a row of logits in memory."""
    return _stride(columns) * LOGITS[dtype].itemsize


def chunk_rows(budget: int, queries: int, columns: int, dtype: str) -> int:
    """How many rows of logits to compute at a time, so that they take no more bytes than ``budget``.

    All of them, or else a multiple of 4, since the kernels take windows that are 16-byte aligned; 0 where 4 are too many.
    """
    fitting = max(budget, 0) // max(row_bytes(columns, dtype), 1)
    return queries if fitting >= queries else fitting // 4 * 4


def _stride(columns: int) -> int:
    return -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def windows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(start, end) of each query, int32 [queries], clamped to the tokens; an empty window starts where it ends."""
    end = inputs["ends"].clamp(0, inputs["k"].shape[0])
    return torch.minimum(inputs["starts"].clamp(min=0), end), end


def inside(inputs: Inputs) -> Tensor:
    """bool [queries, columns]: the column holds a token of the query's window."""
    start, end = windows(inputs)
    if "max_window" in inputs:
        start, end = torch.zeros_like(start), end - start
    column = torch.arange(_columns(inputs), device=end.device)
    return (column >= start[:, None]) & (column < end[:, None])


def _columns(inputs: Inputs) -> int:
    """Columns of the logits: the tokens, or as many as the caller has for the longest window."""
    return inputs.get("max_window", inputs["k"].shape[0])


def _gluon_constraints(spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("wgmma", 1.0, f"wgmma: the template is written for Hopper (sm_90), {gpu.name} is sm_{gpu.capability}")
    smem = (_GLUON_COLUMNS + config["num_stages"] * config["block_n"]) * spec.head_dim + 8 * (config["num_stages"] + 1)
    yield from exceeds("smem", config["blocks_per_sm"] * (smem + 1024), gpu.smem_per_sm, " B")  # 1024: the system's own
    # Products, weights, and a window and an address for each of a thread's queries; ptxas reported up to 8 above that.
    registers = 64 * config["accumulators"] + 64 + 4 * (64 // spec.heads) + 20
    yield from exceeds("registers", registers, _gluon_registers(config))


def _gluon_registers(config: Config) -> int:
    """The cap per thread that leaves room for the config's resident blocks in Hopper's register file of 65536."""
    return {2: 255, 3: 168}[config["blocks_per_sm"]]


def _gluon_numbers(spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
    """Names for the Gluon template: how a block's columns come in two parts, and the layouts that follow from it."""
    part_heads = min(spec.heads, 32)
    part_queries = 4 * (32 // part_heads)  # four lanes share a row of the accumulator; each holds 32 columns: its queries
    query_parts = _GLUON_COLUMNS // spec.heads // part_queries
    next_queries = [4 << bit for bit in range((part_queries // 4).bit_length() - 1)]
    next_heads = [1 << bit for bit in range(part_heads.bit_length() - 1)]
    return {
        "block_q": part_queries * query_parts,
        "part_heads": part_heads,
        "part_queries": part_queries,
        "query_parts": query_parts,
        "next_query": part_queries if query_parts == 2 else 0,
        "next_head": 0 if query_parts == 2 else part_heads,
        "score_registers": str([[8, 0], *([0, query] for query in next_queries)]),
        "weight_registers": str([*([0, head] for head in next_heads), *([query, 0] for query in next_queries)]),
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


OP = Indexer()
