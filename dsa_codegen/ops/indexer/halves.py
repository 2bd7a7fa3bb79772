"""The CUDA template: half of each ReLU by a product of some columns more, stages of keys that no barrier of all threads frees.

``relu`` says how the sums over heads are made: by a maximum for each product, or by |x|, where x of all heads is the keys'
product with a query's weighted sum of heads, in four e4m3 pieces. These leave an error of 2^-20 or so of that sum, where
Hopper's sums of FP8 products keep 13 bits. NaN shows where a maximum would show it; an infinite weight leaves no number in its
query's row, infinities where a maximum of negative products gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...gpu import Gpu
from ...problem.op import Config, Parameter, Violation, exceeds
from .parts import REGISTERS, parts_of
from .problem import IndexerSizes, IndexerSpec

_PIECES = 4
_OF_THE_SYSTEM = 1024  # bytes of a block's shared memory

PARAMETERS = (
    Parameter("relu", ("max", "halves"), "a maximum for each product; or |x|, and x of all heads by a product of its own"),
    Parameter("block_n", (64, 128), "tokens per stage of keys, in tiles of 64"),
    Parameter("num_stages", (2, 3, 4, 5, 6, 8, 12), "stages of keys in flight"),
    Parameter("groups", (1, 3), "groups of four warps of a block that share its keys, each with queries of its own"),
    Parameter("blocks_per_sm", (1, 2, 3), "resident blocks: registers are capped and waves counted for so many"),
)

CONFIG = Config.of("cuda", relu="halves", block_n=128, num_stages=6, groups=3, blocks_per_sm=1)
CONFIGS = {64: CONFIG, 32: CONFIG.replace(relu="max")}
"""By heads: pieces take 6 % more columns of 64, 12 % of 32."""


def constraints(spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do."""
    if gpu.capability != 90:
        yield Violation("wgmma", 1.0, f"wgmma: the template is written for Hopper (sm_90), {gpu.name} is sm_{gpu.capability}")
    if spec.head_dim != 128 or spec.score != "weighted_relu":
        reason = f"shape: {spec.score} of {spec.head_dim} channels is served by the other templates alone"
        yield Violation("shape", 1.0, reason)
        return
    numbers, groups = derived(spec, config), config["groups"] * config["blocks_per_sm"]
    yield from exceeds("groups", groups, 3)
    smem = config["blocks_per_sm"] * (numbers["smem"] + _OF_THE_SYSTEM)
    yield from exceeds("smem", smem, gpu.smem_per_sm, " B")
    # Products, weights, a unit and an address for each of a thread's queries; ptxas needs some 24 above that.
    each = numbers["halves"] + 2 * spec.compressed
    registers = max(numbers["sizes"]) // 2 + 64 + each * numbers["own"] + 24
    yield from exceeds("registers", registers, REGISTERS[min(groups, 3)])


def is_first_choice(spec: IndexerSpec, sizes: IndexerSizes) -> bool:
    """Whether ``CONFIGS`` has the default for these sizes.

    Of 64 heads from 65 queries on, where twelve to a block are few enough to fill it: 64 of 32K tie with Gluon's. Of 32
    heads at 4096 queries of 32K, where 894 us were measured for 924 (H200).
    """
    few, many = sizes.EDGES["queries"]
    return sizes.queries >= few if spec.heads == 64 else sizes.queries >= many and sizes.context >= sizes.EDGES["context"][0]


def order(config: Config) -> str:
    """A thread adds a query's heads one after the other; pieces follow from the query alone."""
    return f"cuda-{config['relu']}"


def derived(spec: IndexerSpec, config: Config) -> dict[str, Any]:
    """Names for the template."""
    parts, halves = parts_of(spec.heads), config["relu"] == "halves"
    quads = parts["part_queries"] // 4
    own = quads * parts["query_parts"]  # queries of a thread
    # Groups of 8 columns beside the heads', two of each lane: for a part's own queries, or two of the pieces in each part.
    beside = _PIECES // 2 * quads if parts["query_parts"] == 2 else _PIECES // 4
    rows = [128 + 8 * beside * halves] * 2
    groups, stages = config["groups"], config["num_stages"]
    barriers = 8 * (2 * stages + groups)
    smem = (stages * config["block_n"] + groups * sum(rows)) * spec.head_dim + barriers + groups * 64 * own * halves
    return {
        **parts,
        "halves": halves,
        "quads": quads,
        "own": own,
        "part_rows": rows,
        "sizes": sorted(set(rows)),
        "tiles": config["block_n"] // 64,
        "lag": 1 if groups == 1 else max(stages // 2, 1),
        "swizzle": 1,
        "near": 1 << 30,
        "smem": smem,
    }
