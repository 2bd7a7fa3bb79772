"""Lightning indexer, decode: FP8 logits of each sequence's newest queries against its paged key cache.

The scores are those of the prefill indexer (``weighted_relu``, ``relu_bias``); query ``i`` of sequence ``b`` sees the tokens
``0 … lengths[b, i] - 1``, which lie in the cache blocks that row ``b`` of the page table names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, compare
from ..caches import IndexKLayout, quantize_groups, valid_slots
from ..draw import Draw
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..paged import check_cache
from ..presets import SCORES, Model
from ..tma import Tiled
from ..values import Scalar, Sizes, Spec, next_power_of_two
from .indexer import LOGITS, empty_logits

SCHEDULES = ("split", "persistent")
_LONGEST = 1 << 30  # tokens of a context: kernels look some stages ahead in 32 bits
_TILE = 64  # tokens of a tile in the Gluon template
_PRODUCE_REGISTERS = 40  # of a thread of the Gluon template's producer


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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("heads", (8, 16, 32, 64))
        self.require_in("head_dim", (32, 64, 128))
        self.require_range("next_n", 1, 8)
        self.require_in("page", (16, 32, 64, 128, 256))
        self.require_in("score", SCORES)
        self.require_in("logits", LOGITS)

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
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"batch": (2, 17), "context": (16385,)}


class IndexerPaged(Op[IndexerPagedSpec, IndexerPagedSizes]):
    """See the module's first lines."""

    name = "indexer_paged"
    summary = "FP8 lightning indexer over a paged key cache: logits of the newest queries of each sequence."
    function = "indexer_logits_paged"
    schema = (
        "(Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor page_table, SymInt max_context, "
        "str score='weighted_relu', str logits='fp32', bool clean=False) -> Tensor"
    )
    spec_type = IndexerPagedSpec
    sizes_type = IndexerPagedSizes
    backends = ("gluon", "triton")
    minor = frozenset({"clean", "score", "page"})
    min_capability = 89

    def specs(self, model: Model) -> Sequence[IndexerPagedSpec]:
        plain = IndexerPagedSpec(model.index_heads, model.index_head_dim, page=model.page, score=model.score)
        return (plain, replace(plain, next_n=2))

    def bind(self, *args: Any) -> tuple[IndexerPagedSpec, IndexerPagedSizes, Inputs]:
        q, cache, weights, lengths, page_table, max_context, score, logits, clean = args
        checks.one_of("score", score, SCORES)
        checks.one_of("logits", logits, tuple(LOGITS))
        q = checks.tensor("q", q, (None, None, None, None), checks.FP8)
        batch, next_n, heads, head_dim = q.shape
        page = check_cache("cache", cache, head_dim + 4, like=q)
        checks.tensor("weights", weights, (batch * next_n, heads), torch.float32, like=q)
        checks.tensor("lengths", lengths, (batch, next_n), torch.int32, like=q)
        checks.tensor("page_table", page_table, (batch, None), torch.int32, like=q, inner_contiguous=True)
        if not 0 <= max_context <= _LONGEST:
            raise InputError("max_context", max_context, f"0 to {_LONGEST}")
        inputs = {"q": q, "cache": cache, "weights": weights, "lengths": lengths, "page_table": page_table}
        spec = IndexerPagedSpec(heads, head_dim, next_n, page, score, logits, clean)
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
        return {
            "q": draw.normal(batch, spec.next_n, spec.heads, spec.head_dim, dtype=checks.FP8),
            "cache": _cache(spec, blocks, draw),
            "weights": draw.normal(batch * spec.next_n, spec.heads, scale=(spec.heads * spec.head_dim) ** -0.5),
            "lengths": lengths,
            "page_table": page_table,
            "max_context": context,
        }

    def reference(self, spec: IndexerPagedSpec, inputs: Inputs) -> Outputs:
        q, page_table, context = inputs["q"], inputs["page_table"], inputs["max_context"]
        weights = inputs["weights"].view(*q.shape[:2], spec.heads)
        logits = torch.full((*q.shape[:2], context), -math.inf, device=q.device)
        for row in range(len(q)):
            key, present = _keys(spec, inputs["cache"], page_table[row], context)
            for query in range(spec.next_n):
                dots = q[row, query].float() @ key.T
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
        moved = tokens * (spec.head_dim + 4) + queries + LOGITS[spec.logits].itemsize * pairs
        return Cost(2 * pairs * spec.heads * spec.head_dim, moved, "fp8")

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
        )
        return tuple(replace(spec, **change) for change in changes)

    def workloads(self, spec: IndexerPagedSpec) -> Sequence[Case[IndexerPagedSizes]]:
        sizes = ((64, 65536), (8, 65536), (1, 65536), (64, 8192), (8, 8192), (1, 8192))
        return [Case(IndexerPagedSizes(batch, context), "full") for batch, context in sizes]

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
            yield from _gluon_constraints(spec, config, gpu)
            return
        group_heads = config["block_q"] * spec.heads
        groups = -(-spec.next_n // config["block_q"])
        threads = 32 * config["num_warps"]
        yield from exceeds("queries per product", config["block_q"], next_power_of_two(spec.next_n))
        yield from exceeds("columns", group_heads, 256)
        yield from exceeds("warpgroup rows", config["num_warps"] * 16, config["block_n"])
        # Accumulator, and the weights of all groups: a thread holds those of a quarter of a group's columns.
        registers = config["block_n"] * group_heads / threads + groups * group_heads / 4
        yield from exceeds("registers", registers, 160)
        smem = (groups * group_heads + config["num_stages"] * config["block_n"]) * spec.head_dim + 8 * config["block_n"]
        yield from exceeds("smem", smem, gpu.smem_per_block, " B")

    def guesses(self, spec: IndexerPagedSpec, sizes: IndexerPagedSizes, gpu: Gpu) -> Iterable[Config]:
        # Many small blocks hide each other's latencies. Where products leave no registers for them, two products per block do.
        # Logits that the L2 can keep are written as they come; with several products per tile DRAM waits anyway.
        many = sizes.batch >= self.sizes_type.EDGES["batch"][-1] and sizes.context >= self.sizes_type.EDGES["context"][-1]
        for part_queries, blocks_per_sm in itertools.product(_part_queries(spec), (4, 3, 2)):
            tiles = 2 if part_queries == spec.next_n and blocks_per_sm == 2 else 1
            for gathered in (96, 32, 1) if many and part_queries == spec.next_n else (1,):
                yield Config.of(
                    "gluon",
                    part_queries=part_queries,
                    block_n=tiles * _TILE,
                    num_stages=2,
                    accumulators=tiles,
                    blocks_per_sm=blocks_per_sm,
                    gathered=gathered,
                )
        # Five blocks per SM with three tiles of 8 KB in flight each. Further queries take registers, so that fewer blocks fit.
        block_q = min(next_power_of_two(spec.next_n), max(1, 128 // spec.heads))
        yield Config.of(
            "triton",
            schedule="split" if sizes.batch == 1 else "persistent",
            block_n=64,
            block_q=block_q,
            num_warps=4,
            num_stages=4,
            blocks_per_sm=5 if spec.next_n == 1 else 3 if block_q >= spec.next_n else 2,
        )

    def derived(self, spec: IndexerPagedSpec, config: Config) -> dict[str, Scalar]:
        if config.backend == "gluon":
            return _gluon_numbers(spec, config)
        return {
            "queries": next_power_of_two(spec.next_n),
            "group_heads": config["block_q"] * spec.heads,
            "groups": -(-spec.next_n // config["block_q"]),
            "scales_base": spec.layout.scale.base,
        }

    def launches(self, spec: IndexerPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, cache, page_table, logits = inputs["q"], inputs["cache"], inputs["page_table"], outputs["logits"]
        batch, context = q.shape[0], inputs["max_context"]
        if not batch or not context:
            return ()
        if not cache.shape[0] and config.backend == "gluon":  # no memory that TMA could be told of, and no token either
            logits.fill_(-math.inf)
            return ()
        tiles = -(-context // config["block_n"])
        programs = config["blocks_per_sm"] * gpu.sms
        tensors: tuple[Any, ...] = (inputs["weights"], inputs["lengths"], page_table, logits)
        sizes = (batch, cache.shape[0], page_table.shape[1], context)
        if config.backend == "gluon":
            grid = _groups(batch, tiles, programs)
            tensors = (q, *_tiled(spec, cache), *tensors)
            scalars = (*sizes, page_table.stride(0), logits.stride(0), grid[1], *_together(config, logits, gpu))
            return (Launch("indexer_paged", (*grid, 1), (*tensors, *scalars)),)
        tensors = (q, cache, *tensors)
        strides = (page_table.stride(0), cache.stride(0), logits.stride(0))
        if config["schedule"] == "persistent":
            return (Launch("indexer_paged", (min(programs, batch * tiles), 1, 1), (*tensors, *sizes, *strides)),)
        splits = min(max(programs // batch, 1), tiles)
        return (Launch("indexer_paged", (batch * splits, 1, 1), (*tensors, *sizes, *strides, splits)),)


def _groups(batch: int, tiles: int, programs: int) -> tuple[int, int]:
    """(groups, programs in each): a group for every row, unless that leaves more than a tenth of the resident programs out."""
    width = min(max(programs // batch, 1), tiles)
    if width == tiles or 0 <= programs - batch * width <= programs // 10:
        return batch, width
    return programs // width, width


def _together(config: Config, logits: Tensor, gpu: Gpu) -> tuple[int, ...]:
    """Of how many stages the logits are written at once, where the config gathers: of one if the L2 keeps them all anyway."""
    kept = logits.nbytes <= gpu.l2 // 5
    return (1 if kept else config["gathered"],) if config["gathered"] > 1 else ()


def _tiled(spec: IndexerPagedSpec, cache: Tensor) -> tuple[Tiled, Tiled]:
    """The cache's keys e4m3 [blocks, page, head_dim] and scales fp32 [blocks, page], for TMA."""
    blocks, stride = cache.shape[0], cache.stride(0)
    keys = Tiled(cache, (blocks, spec.page, spec.head_dim), (stride, spec.head_dim, 1))
    return keys, Tiled(cache, (blocks, spec.page), (stride // 4, 1), spec.layout.scale.base)


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
    tiles = config["block_n"] // _TILE
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
    lane_queries = min(4, part_queries)
    lanes = [[0, bit if bit < lane_queries else 0] for bit in (1, 2)]
    queries = [[0, lane_queries << bit] for bit in range((part_queries // lane_queries).bit_length() - 1)]
    box = min(spec.page, _TILE)
    pieces = config["block_n"] // box
    return {
        "box": box,
        "pieces": pieces,
        "tiles": config["block_n"] // _TILE,
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


def inside(inputs: Inputs) -> Tensor:
    """bool [batch × next_n, max_context]: the token lies below the query's length."""
    token = torch.arange(inputs["max_context"], device=inputs["q"].device)
    return token < inputs["lengths"].flatten()[:, None]


def _cache(spec: IndexerPagedSpec, blocks: int, draw: Draw) -> Tensor:
    """Quantised normal keys, a part of the blocks at a time: all in fp32 would take four times the cache."""
    cache = spec.layout.empty(blocks, draw.device)
    if draw.device == "meta":
        return cache
    step = max(1, (1 << 22) // spec.page)
    for first in range(0, blocks, step):
        slots = torch.arange(first * spec.page, min(first + step, blocks) * spec.page, device=draw.device)
        keys, scales = quantize_groups(draw.normal(len(slots), spec.head_dim), spec.head_dim)
        spec.layout.pack(cache, slots, keys, scales[:, 0])
    return cache


def _keys(spec: IndexerPagedSpec, cache: Tensor, pages: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """fp32 keys [n, head_dim] of one row's pages, and whether each lies in the cache [n]."""
    place = torch.arange(spec.page, device=pages.device)
    present = valid_slots(pages, len(cache)).repeat_interleave(spec.page)[:context]
    slots = (pages.long()[:, None] * spec.page + place).flatten()[:context]
    if not len(cache):
        return torch.zeros(len(slots), spec.head_dim, device=pages.device), present
    return spec.layout.dequantize(cache, slots.masked_fill(~present, 0)), present


def _part_queries(spec: IndexerPagedSpec) -> list[int]:
    """Queries per product that leave no part of it empty, the most first."""
    return [queries for queries in (16, 8, 4, 2, 1) if spec.next_n % queries == 0 and queries * spec.heads <= 128]


OP = IndexerPaged()
