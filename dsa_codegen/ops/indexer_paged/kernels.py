"""Kernels of the paged indexer: a ring of the cache's pages, few blocks per SM (Gluon, CUDA C++), and plain tiles (Triton)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ...gpu import Gpu
from ...problem.checks import pieces
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from ..logits import weight_stride, whole_weights
from . import halves
from .launching import TILE, row_groups, tiled
from .problem import IndexerPagedSizes, IndexerPagedSpec

SCHEDULES = ("split", "persistent")
_NATIVE_HEADS, _NATIVE_WIDTHS = (8, 16, 32, 64), (32, 64, 128)  # of the Gluon template
_QUAD = 4  # lanes that share a row of a product
_PRODUCE_REGISTERS = 40  # of a thread of the Gluon template's producer


class IndexerPagedKernels(Kernels[IndexerPagedSpec, IndexerPagedSizes]):
    """See the module's first lines."""

    backends = ("gluon", "triton", "cuda")
    budgeted = True
    min_capability = 89

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        if backend == "gluon":
            return (
                Parameter("part_queries", (1, 2, 4, 8, 16), "queries of a sequence whose heads share one product"),
                Parameter("block_n", (64, 128), "tokens per stage, in tiles of 64"),
                Parameter("num_stages", (2, 3, 4, 5, 6, 8, 10, 12), "stages of keys in flight"),
                Parameter("accumulators", (1, 2), "products in flight"),
                Parameter("blocks_per_sm", (1, 2, 3, 4), "resident blocks: registers are capped for so many"),
                Parameter("gathered", (1, 16, 32, 48, 64, 96, 128), "stages whose logits are written at once"),
            )
        if backend == "cuda":
            return halves.PARAMETERS
        return (
            Parameter("schedule", SCHEDULES, "each row's tiles in turn to its programs, or the batch's in equal stretches"),
            Parameter("block_n", (64, 128, 256), "tokens per tile, the M operand of the matrix product"),
            Parameter("block_q", (1, 2, 4, 8), "queries of a sequence whose heads share one product"),
            Parameter("num_warps", (4, 8), "warps per block"),
            Parameter("num_stages", (2, 3, 4, 5, 6), "tiles of keys in flight"),
            Parameter("blocks_per_sm", (1, 2, 3, 4, 5, 6, 8, 16), "blocks launched per SM", launch_only=True),
        )

    def constraints(self, spec: IndexerPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "gluon":
            if spec.scores != "fp8":
                yield Violation("scores", 1.0, f"scores: {spec.scores} is served by the Triton template alone")
            if spec.heads not in _NATIVE_HEADS or spec.head_dim not in _NATIVE_WIDTHS:
                reason = f"heads: {spec.heads} of {spec.head_dim} channels are served by the Triton template alone"
                yield Violation("heads", 1.0, reason)
                return
            yield from _gluon_constraints(spec, config, gpu)
            return
        if config.backend == "cuda":
            yield from halves.constraints(spec, config, gpu)
            return
        group_heads = config["block_q"] * _padded_heads(spec, config)
        groups = -(-spec.next_n // config["block_q"])
        threads = 32 * config["num_warps"]
        yield from exceeds("queries per product", config["block_q"], next_power_of_two(spec.next_n))
        yield from exceeds("columns", group_heads, 256)
        yield from exceeds("warpgroup rows", config["num_warps"] * 16, config["block_n"])
        # Accumulator, and the weights of all groups: a thread holds those of a quarter of a group's columns.
        registers = config["block_n"] * group_heads / threads + groups * group_heads / 4
        yield from exceeds("registers", registers, 160)
        width = 1 if spec.scores == "fp8" else 2
        smem = (groups * group_heads + config["num_stages"] * config["block_n"]) * next_power_of_two(spec.head_dim) * width
        smem += 8 * config["block_n"]
        yield from exceeds("smem", smem, gpu.smem_per_block, " B")

    def order(self, spec: IndexerPagedSpec, config: Config) -> str | None:
        """Every token's score is its own; of few queries a product's columns lie so that four lanes share a query's heads."""
        if config.backend == "gluon":
            return f"gluon-{min(config['part_queries'], _QUAD)}"
        if config.backend == "cuda":
            return "cuda" if config["halved"] else "cuda-relu"
        return "-".join(["triton", *(str(config[name]) for name in ("block_q", "block_n", "num_warps"))])

    def guesses(self, spec: IndexerPagedSpec, sizes: IndexerPagedSizes, gpu: Gpu) -> Iterable[Config]:
        _, several, crowd = IndexerPagedSizes.EDGES["batch"]
        middling, past_middling, long = IndexerPagedSizes.EDGES["context"]
        many = sizes.batch >= several and sizes.context >= long
        crowded = sizes.batch >= crowd and sizes.context >= middling  # two queries of 256 x 8K: 84 us for 92
        # Of 100 x 1K four queries take 12 us for 32, one of 64 x 2K 7.1 for 6.7; two of 300 x 5000 57 for 65, three 97 for 95.
        fewest, short = (crowd, past_middling) if spec.next_n < 3 else (several, middling)
        if sizes.context < short and sizes.batch >= fewest and halves.streams(spec):
            yield halves.guess_short(spec)
        if (many or crowded) and halves.wins(spec):
            yield halves.guess(spec)
        # Many small blocks hide each other's latencies. Where products leave no registers for them, two products per block do.
        # Logits that the L2 can keep are written as they come; with several products per tile DRAM waits anyway. So are those
        # of several queries: 64 rows of 64K with two take 162 µs on an H200, gathered 195 in turns with it (160 alone).
        for part_queries, blocks_per_sm in itertools.product(_part_queries(spec), (4, 3, 2)):
            tiles = 2 if part_queries == spec.next_n and blocks_per_sm == 2 else 1
            together = many and part_queries == spec.next_n
            for gathered, num_stages in _written(spec.next_n) if together else ((1, 2),):
                yield Config.of(
                    "gluon",
                    part_queries=part_queries,
                    block_n=tiles * TILE,
                    num_stages=num_stages,
                    accumulators=tiles,
                    blocks_per_sm=blocks_per_sm,
                    gathered=gathered,
                )
        # Five blocks per SM with three tiles of 8 KB in flight each. Further queries take registers, so that fewer blocks fit.
        block_q = min(next_power_of_two(spec.next_n), max(1, 128 // next_power_of_two(spec.heads)))
        blocks_per_sm, num_stages = 5 if spec.next_n == 1 else 3 if block_q >= spec.next_n else 2, 4
        if spec.scores != "fp8":  # tiles of 16 KB; 47.3 µs become 38.2 for 8 rows of 64K on an H200
            few = sizes.batch == 1  # 4.5 µs become 4.1 for one of 32K
            blocks_per_sm, num_stages = (4, 2) if few and spec.next_n == 1 else (min(blocks_per_sm, 3), 3)
        yield Config.of(
            "triton",
            schedule="split" if sizes.batch == 1 else "persistent",
            block_n=64,
            block_q=block_q,
            num_warps=4,
            num_stages=num_stages,
            blocks_per_sm=blocks_per_sm,
        )

    def derived(self, spec: IndexerPagedSpec, config: Config) -> dict[str, Scalar]:
        if config.backend == "gluon":
            return _gluon_numbers(spec, config)
        if config.backend == "cuda":
            return halves.derived(spec, config)
        return {
            "queries": next_power_of_two(spec.next_n),
            "group_heads": config["block_q"] * _padded_heads(spec, config),
            "heads_padded": _padded_heads(spec, config),
            "dim_padded": next_power_of_two(spec.head_dim),
            "whole_weights": whole_weights(spec.heads),
            "groups": -(-spec.next_n // config["block_q"]),
            "scales_base": spec.layout.scale.base,
        }

    def launches(self, spec: IndexerPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, cache, page_table, logits = inputs["q"], inputs["cache"], inputs["page_table"], outputs["logits"]
        batch, context = q.shape[0], inputs["max_context"]
        if not batch or not context:
            return ()
        if not cache.shape[0] and config.backend != "triton":  # no memory that TMA could be told of, and no token either
            logits.fill_(-math.inf)
            return ()
        if config.backend == "cuda":
            return halves.launches(spec, config, inputs, logits, gpu)
        tiles = -(-context // config["block_n"])
        programs = config["blocks_per_sm"] * gpu.sms
        tensors: tuple[Any, ...] = (inputs["weights"], inputs["lengths"], page_table, logits)
        sizes = (batch, cache.shape[0], page_table.shape[1])
        apart = (*(pieces(q, dimension) for dimension in range(3)), weight_stride(inputs["weights"]))
        if config.backend == "gluon":
            grid = row_groups(batch, tiles, programs)
            tensors = (q, *tiled(spec, cache), *tensors)
            rows = (*apart, page_table.stride(0), logits.stride(0))
            scalars = (*sizes, spec.page.bit_length() - 1, context, *rows, grid[1], *_together(config, logits, gpu))
            return (Launch("indexer_paged", (*grid, 1), (*tensors, *scalars)),)
        tensors = (q, cache, *tensors)
        strides = (*apart, page_table.stride(0), cache.stride(0), logits.stride(0))
        if config["schedule"] == "persistent":
            return (Launch("indexer_paged", (min(programs, batch * tiles), 1, 1), (*tensors, *sizes, context, *strides)),)
        splits = min(max(programs // batch, 1), tiles)
        return (Launch("indexer_paged", (batch * splits, 1, 1), (*tensors, *sizes, context, *strides, splits)),)


def _padded_heads(spec: IndexerPagedSpec, config: Config) -> int:
    """Heads of a query in the Triton template's products, of at least 8 columns."""
    return max(next_power_of_two(spec.heads), 8 // int(config["block_q"]))


def _written(next_n: int) -> tuple[tuple[int, int], ...]:
    """(stages whose logits are written at once, stages in flight) of large batches, the best that fits first."""
    return ((96, 2), (32, 2), (1, 2)) if next_n == 1 else ((1, 4), (1, 2))


def _together(config: Config, logits: Tensor, gpu: Gpu) -> tuple[int, ...]:
    """Of how many stages the logits are written at once, where the config gathers: of one if the L2 keeps them all anyway."""
    kept = logits.nbytes <= gpu.l2 // 5
    return (1 if kept else config["gathered"],) if config["gathered"] > 1 else ()


def _gluon_constraints(spec: IndexerPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("wgmma", 1.0, f"wgmma: the template is written for Hopper (sm_90), {gpu.name} is sm_{gpu.capability}")
    if spec.page < 32:
        yield Violation("page", 1.0, f"page: TMA writes scales in steps of 128 bytes (32 tokens), a page has {spec.page}")
    columns = config["part_queries"] * spec.heads
    parts = -(-spec.next_n // config["part_queries"])
    yield from exceeds("queries per product", config["part_queries"], next_power_of_two(spec.next_n))
    yield from exceeds("columns", columns, 256)
    held = 4 * parts * columns if parts > 1 else 0  # weights
    if config["gathered"] > 1:
        held += 4 * config["gathered"] * config["block_n"] * parts * config["part_queries"]
    smem = parts * columns * spec.head_dim + held + config["num_stages"] * (config["block_n"] * (spec.head_dim + 8) + 16)
    yield from exceeds("smem", config["blocks_per_sm"] * (smem + 1024), gpu.smem_per_sm, " B")  # 1024: the system's own
    # Products, weights of a part, and lengths of a thread's queries.
    tiles = config["block_n"] // TILE
    yield from exceeds("resident blocks", config["blocks_per_sm"], 2 if parts > 2 else 4)  # more parts need more registers
    yield from exceeds("tiles of a stage", tiles, 2 if parts == 1 else 1)  # ptxas spills where more products follow each other
    yield from exceeds("accumulators", config["accumulators"], parts * tiles)
    lengths = parts * max(1, config["part_queries"] // 4)
    registers = config["accumulators"] * columns / 2 + columns / 4 + lengths + 36
    start, consume = _gluon_registers(config)
    yield from exceeds("registers", registers, consume)
    # ptxas wants a product's operands to fit the registers that a thread starts with.
    yield from exceeds("product's registers", columns / 2 + 26, start)


def _gluon_registers(config: Config) -> tuple[int, int]:
    """Registers per thread at the start, when two warp groups of each resident block share Hopper's 65536, and of the consumer.

    The producer's one warp counts as a group.
    """
    start = min(128, 65536 // (256 * config["blocks_per_sm"])) // 8 * 8
    return start, 2 * start - _PRODUCE_REGISTERS


def _gluon_numbers(spec: IndexerPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the Gluon template: how a row's queries come in parts, and the layouts that follow from it."""
    part_queries = config["part_queries"]
    lane_queries = min(_QUAD, part_queries)
    lanes = [[0, bit if bit < lane_queries else 0] for bit in (1, 2)]
    queries = [[0, lane_queries << bit] for bit in range((part_queries // lane_queries).bit_length() - 1)]
    box = min(spec.page, TILE)
    pieces = config["block_n"] // box
    return {
        "box": box,
        "pieces": pieces,
        "tiles": config["block_n"] // TILE,
        "next_blocks_of_stage": ", ".join(f"next_block{piece}" for piece in range(pieces)),
        "blocks_of_stage": ", ".join(f"block{piece}" for piece in range(pieces)),
        "parts": -(-spec.next_n // part_queries),
        "columns": part_queries * spec.heads,
        "lane_queries": lane_queries,
        "lane_heads": lane_queries * spec.heads // 4,
        "score_registers": str([[8, 0], *queries]),
        "score_lanes": str([*lanes, [1, 0], [2, 0], [4, 0]]),
        "row_lanes": str([512 // spec.head_dim, spec.head_dim // 16]),
        "produce_registers": _PRODUCE_REGISTERS,
        "maxnreg": _gluon_registers(config)[0],
    }


def _part_queries(spec: IndexerPagedSpec) -> list[int]:
    """Queries per product that leave no part of it empty, the most first."""
    return [queries for queries in (16, 8, 4, 2, 1) if spec.next_n % queries == 0 and queries * spec.heads <= 128]
