"""Kernels of the prefill indexer: keys as the rows of a product, queries × heads as its columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...kernels.tma import Tiled
from ...kernels.waves import share_out
from ...problem.checks import pieces
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from ..logits import weight_stride, whole_weights
from . import halves
from .parts import COLUMNS, REGISTERS, parts_of
from .problem import (
    IndexerSizes,
    IndexerSpec,
    columns_of,
)

_NATIVE_HEADS, _NATIVE_WIDTHS = (8, 16, 32, 64), (32, 64, 128)  # of the templates for Hopper
_WITHIN = 1 << 31  # elements from a block's first row of logits that 32 bits count


class IndexerKernels(Kernels[IndexerSpec, IndexerSizes]):
    """See the module's first lines."""

    backends = ("cuda", "gluon", "triton", "tilelang")
    budgeted = True
    min_capability = 89

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        if backend == "gluon":
            return (
                Parameter("accumulators", (1, 2), "products in flight: one at a time, or two that take turns"),
                Parameter("block_n", (64, 128), "tokens per stage of keys, in tiles of 64"),
                Parameter("num_stages", (2, 3, 4, 5, 6, 8), "stages of keys in flight"),
                Parameter("blocks_per_sm", (2, 3), "resident blocks: registers are capped and waves counted for so many"),
                Parameter("edges", (False, True), "whether only tiles that reach beyond a window are masked", before=False),
                Parameter("unrolled", (False, True), "whether the tiles of a stage are written out one by one", before=False),
            )
        if backend == "cuda":
            return halves.PARAMETERS
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
        if spec.scores != "fp8" and config.backend != "triton":
            yield Violation("scores", 1.0, f"scores: {spec.scores} is served by the Triton template alone")
            return
        if config.backend != "triton" and (spec.heads not in _NATIVE_HEADS or spec.head_dim not in _NATIVE_WIDTHS):
            reason = f"heads: {spec.heads} of {spec.head_dim} channels are served by the Triton template alone"
            yield Violation("heads", 1.0, reason)
            return
        if config.backend == "gluon":
            yield from _gluon_constraints(spec, config, gpu)
            return
        if config.backend == "cuda":
            yield from halves.constraints(spec, config, gpu)
            return
        columns = config["block_q"] * next_power_of_two(spec.heads)
        width = next_power_of_two(spec.head_dim)
        smem = (columns + config["num_stages"] * config["block_n"]) * width * _operand_bytes(spec)
        yield from exceeds("smem", smem + 2048, gpu.smem_per_block, " B")  # barriers and what is reserved
        yield from exceeds("columns", 16, columns)
        if config.backend == "tilelang":
            yield from _tilelang_constraints(spec, config, gpu)
            return
        yield from exceeds("columns", columns, 256)
        yield from exceeds("warpgroup rows", config["num_warps"] * 16, config["block_n"])
        # The accumulator lies in registers; beyond 192 of 255 the epilogue spills. That of bf16 products, two of which are in
        # flight, spills 416 bytes and more beyond 64 (Triton 3.6 and 3.7, sm_90a).
        most = 192 if spec.scores == "fp8" else 64
        yield from exceeds("accumulator registers", config["block_n"] * columns / (32 * config["num_warps"]), most)

    def order(self, spec: IndexerSpec, config: Config) -> str | None:
        """Every token's score is its own. In Gluon a thread adds a query's heads one after the other, whatever the tile."""
        if config.backend == "gluon":
            return "gluon"
        if config.backend == "cuda":
            return halves.order(config)
        shape = ("block_q", "block_n", "num_warps" if config.backend == "triton" else "threads")
        return "-".join([config.backend, *(str(config[name]) for name in shape)])

    def guesses(self, spec: IndexerSpec, sizes: IndexerSizes, gpu: Gpu) -> Iterable[Config]:
        shared = halves.CONFIGS.get(spec.heads)
        first = shared is not None and halves.is_first_choice(spec, sizes)
        if shared is not None and first:
            yield shared
        # One accumulator and three blocks per SM, where that spills nothing. Up to 32 heads a tile has so many scores that
        # masks are worth avoiding: 4096 queries of 32768 tokens on an H200 with 8, 16, 32, 64 heads 276, 520, 902, 1770 us,
        # with all masks 306, 561, 922, 1777. Unrolled 8 heads spill.
        edges = spec.heads <= 32 and not spec.compressed
        hopper = Config.of("gluon", accumulators=1, block_n=128, num_stages=2, blocks_per_sm=3, edges=edges, unrolled=False)
        if edges:
            hopper = hopper.replace(unrolled=spec.heads > 8)
        elif spec.heads == 8:
            hopper = hopper.replace(accumulators=2, block_n=64, num_stages=4, blocks_per_sm=2)
        yield hopper
        if shared is not None and not first:  # for specs of one order, whatever the sizes
            yield shared
        # Where the operands lie in registers too, 256 spill 250 to 380 bytes.
        columns = 256 if gpu.capability == 90 and spec.scores == "fp8" else 128
        block_q = min(16, columns // next_power_of_two(spec.heads))
        blocks = -(-sizes.queries // block_q)
        splits = next((s for s in (1, 2, 4) if s * blocks >= 4 * gpu.sms), 8)
        yield Config.of("triton", block_q=block_q, block_n=64, num_warps=4, num_stages=3, splits=splits)

    def derived(self, spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
        if config.backend == "gluon":
            return _gluon_numbers(spec, config)
        if config.backend == "cuda":
            return halves.derived(spec, config)
        padded = {"heads_padded": next_power_of_two(spec.heads), "dim_padded": next_power_of_two(spec.head_dim)}
        columns: dict[str, Scalar] = {"columns": config["block_q"] * padded["heads_padded"], **padded}
        if config.backend == "triton":
            return {**columns, "whole_weights": whole_weights(spec.heads)}
        split_q = _query_groups(config)
        lanes = spec.head_dim // 16
        columns |= {"lanes": lanes, "q_rounds": -(-config["block_q"] * spec.heads * lanes // config["threads"])}
        policy = "FullRow" if split_q == 1 else "FullCol"
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[spec.logits]
        return {**columns, "split_q": split_q, "group_q": config["block_q"] // split_q, "policy": policy, "dtype": dtype}

    def launches(self, spec: IndexerSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, k, logits = inputs["q"], inputs["k"], outputs["logits"]
        queries, tokens = q.shape[0], k.shape[0]
        columns = columns_of(inputs)
        if not queries or not columns:
            return ()
        if not tokens:  # of no keys no kernel can load a tile
            if spec.clean:
                logits.fill_(-math.inf)
            return ()
        width = (columns,) if spec.compressed else ()
        if config.backend in ("cuda", "gluon"):
            groups = config["groups"] if config.backend == "cuda" else 1
            blocks = -(-queries * spec.heads // (COLUMNS * groups))
            # The windows stay on the GPU: they are taken to be causal, as most are.
            window = min(tokens, columns)
            longest, shortest = -(-window // 64), max(window - queries, 0) // 64
            whole, splits = share_out(blocks, config["blocks_per_sm"] * gpu.sms, longest, shortest)
            pairs = Tiled(q, (spec.heads // 2, queries, 2, spec.head_dim), (2 * q.stride(1), q.stride(0), q.stride(1), 1))
            rest = (inputs["k_scale"], inputs["weights"], inputs["starts"], inputs["ends"], logits)
            scalars = (queries, tokens, pieces(inputs["weights"], 0), logits.stride(0), whole, splits, *width)
            return (Launch("indexer", (whole + (blocks - whole) * splits, 1, 1), (pairs, Tiled(k), *rest, *scalars)),)
        scales = () if inputs["k_scale"] is None else (inputs["k_scale"],)
        tensors = (q, k, *scales, inputs["weights"], inputs["starts"], inputs["ends"], logits)
        grid = (-(-queries // config["block_q"]), config["splits"], 1)
        if config.backend == "tilelang":
            return (Launch("indexer", grid, (*tensors, config["splits"])),)
        strides = (pieces(q, 0), pieces(q, 1), pieces(k, 0), weight_stride(inputs["weights"]), logits.stride(0))
        return (Launch("indexer", grid, (*tensors, queries, tokens, *strides, *width)),)


def _operand_bytes(spec: IndexerSpec) -> int:
    return 1 if spec.scores == "fp8" else 2


def _gluon_constraints(spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("wgmma", 1.0, f"wgmma: the template is written for Hopper (sm_90), {gpu.name} is sm_{gpu.capability}")
    smem = (COLUMNS + config["num_stages"] * config["block_n"]) * spec.head_dim + 8 * (config["num_stages"] + 1)
    yield from exceeds("smem", config["blocks_per_sm"] * (smem + 1024), gpu.smem_per_sm, " B")  # 1024: the system's own
    # Products, weights, and a window and an address for each of a thread's queries; ptxas reported up to 8 above that.
    each = 1 if config["edges"] and not spec.compressed else 4
    registers = 64 * config["accumulators"] + 64 + each * (64 // spec.heads) + 20
    yield from exceeds("registers", registers, REGISTERS[config["blocks_per_sm"]])


def _gluon_numbers(spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
    """Names for the Gluon template: its parts, and the layouts that follow from them."""
    parts = parts_of(spec.heads)
    part_heads, part_queries = parts["part_heads"], parts["part_queries"]
    next_queries = [4 << bit for bit in range((part_queries // 4).bit_length() - 1)]
    next_heads = [1 << bit for bit in range(part_heads.bit_length() - 1)]
    return {
        **parts,
        "score_registers": str([[8, 0], *([0, query] for query in next_queries)]),
        "weight_registers": str([*([0, head] for head in next_heads), *([query, 0] for query in next_queries)]),
        "maxnreg": REGISTERS[config["blocks_per_sm"]],
        "edges": config["edges"] and not spec.compressed,  # columns of compressed rows begin where each window does
        "near": _WITHIN // parts["block_q"],
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
