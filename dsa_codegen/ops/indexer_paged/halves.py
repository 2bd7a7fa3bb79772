"""The CUDA C++ template: tiles stream through a ring from row to row, and no barrier of all threads.

Long rows have half of each ReLU by a product of eight columns more: ``relu(x) = |x| / 2 + x / 2``, a multiply-add takes |x| as
it is, and x of all heads is the keys' product with a query's weighted sum of heads, in e4m3 pieces (see ``indexer.halves``).
To prepare that takes 2 to 3 µs, as long as a row of 512 tokens does: short rows have their queries as they come, by TMA. One
block an SM: a group of four warps brings tiles of keys and queries, the others multiply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...gpu import Gpu
from ...kernels.tma import Tiled
from ...problem.checks import pieces
from ...problem.op import Config, Inputs, Launch, Parameter, Violation, exceeds
from ...problem.values import Scalar
from ..logits import weight_stride
from .launching import TILE, keys_and_scales, whole_rows
from .problem import IndexerPagedSpec

_PLACE = 9216  # bytes of a tile in the ring: 64 keys, their scales, what is said of it
_PREPARE_REGISTERS = 72  # of a thread of the group that brings keys and queries
_WHOLE = 16  # tiles of short rows that stay whole where they are more than SMs; of three queries and more fewer
_WINS = (2, 3, 4, 5, 6)  # queries of 64 heads: of 64 x 64K two take 159 us for 174, three 259 for 294, one 141 for 141
_SERVES: Mapping[str, tuple[Any, ...]] = {
    "scores": ("fp8",),
    "score": ("weighted_relu",),
    "heads": (16, 32, 64),
    "head_dim": (128,),
    "next_n": (1, 2, 3, 4, 5, 6),
    "page": (64, 128, 256),
}

PARAMETERS = (
    Parameter("groups", (1, 2, 3, 4), "groups of four warps that multiply, each the tiles or the queries of its own"),
    Parameter("accumulators", (1, 2), "products in flight of a group"),
    Parameter("producers", (1, 2, 3), "warps that bring tiles in turn", before=1),
    Parameter("num_stages", (4, 6, 8, 12, 16, 18), "tiles of keys in flight"),
    Parameter("gathered", (0, 16, 32, 48, 64, 96, 128), "tiles whose logits are written at once, 0: each alone"),
    Parameter("halved", (1, 0), "half of each ReLU by a product: fewer sums, but queries that are prepared", before=1),
    Parameter("segments", (2, 3, 4, 6), "rows whose queries are there at once, where none are prepared", before=2),
)


def wins(spec: IndexerPagedSpec) -> bool:
    """Whether it is the fastest where sequences and tokens are many."""
    return spec.heads == 64 and spec.next_n in _WINS and not spec.batch_invariant


def guess(spec: IndexerPagedSpec) -> Config:
    """What serves then. Where two or three queries let memory set the pace, more tiles are on their way, by two warps."""
    groups = {2: 3}.get(spec.next_n, -(-spec.next_n // 2))
    producers, num_stages = {2: (2, 18), 3: (2, 12)}.get(spec.next_n, (1, 8))
    accumulators = 2 if spec.next_n in (3, 4) else 1
    return Config.of(
        "cuda",
        groups=groups,
        accumulators=accumulators,
        producers=producers,
        num_stages=num_stages,
        gathered=0,
        halved=1,
        segments=2,
    )


def streams(spec: IndexerPagedSpec) -> bool:
    """Whether it is the fastest where sequences are many and contexts short: two queries of 600 x 512 take 16 µs for 28."""
    return not any(getattr(spec, field) not in served for field, served in _SERVES.items()) and not spec.batch_invariant


def guess_short(spec: IndexerPagedSpec) -> Config:
    """What serves then: as many tiles and rows' queries on their way as shared memory holds."""
    groups, num_stages, segments = {1: (3, 18, 4), 2: (3, 18, 3), 3: (2, 12, 3), 4: (2, 12, 3)}.get(spec.next_n, (3, 12, 2))
    accumulators = 2 if spec.next_n == 4 else 1
    return Config.of(
        "cuda",
        groups=groups,
        accumulators=accumulators,
        producers=2,
        num_stages=num_stages,
        gathered=0,
        halved=0,
        segments=segments,
    )


def launches(spec: IndexerPagedSpec, config: Config, inputs: Inputs, logits: Tensor, gpu: Gpu) -> Sequence[Launch]:
    """Of rows that have tokens."""
    q, cache, page_table = inputs["q"], inputs["cache"], inputs["page_table"]
    batch, tiles = q.shape[0], -(-inputs["max_context"] // TILE)
    whole = _WHOLE if spec.next_n < 3 else _WHOLE // spec.next_n
    cut = not config["halved"] and batch > gpu.sms and tiles > whole
    grid = (gpu.sms, 1) if cut else whole_rows(batch, tiles, gpu.sms)
    tensors = (cache, inputs["weights"], inputs["lengths"], page_table, logits)
    sizes = (batch, cache.shape[0], page_table.shape[1], inputs["max_context"])
    apart = tuple(pieces(q, dimension) for dimension in range(3)) if config["halved"] else ()
    rows = (weight_stride(inputs["weights"]), page_table.stride(0), cache.stride(0), logits.stride(0))
    first = keys_and_scales(spec, cache), q if config["halved"] else Tiled(q)
    return (Launch("indexer_paged", (*grid, 1), (*first, *tensors, *sizes, *apart, *rows)),)


def constraints(spec: IndexerPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do."""
    if gpu.capability != 90:
        yield Violation("wgmma", 1.0, f"wgmma: the template is written for Hopper (sm_90), {gpu.name} is sm_{gpu.capability}")
    for field, served in _SERVES.items():
        if getattr(spec, field) not in served:
            yield Violation(field, 1.0, f"{field}: the template in CUDA C++ does not serve {getattr(spec, field)}")
            return
    parts, groups = -(-spec.next_n // 2), config["groups"]
    if groups % parts:
        yield Violation("groups", 1.0, f"groups: {groups} of them do not share out {parts} parts of queries")
        return
    if config["num_stages"] % (groups // parts):
        # A place in the ring is one group's: another's could take the phase of a tile that is late for that of its own.
        reason = f"stages: groups take {groups // parts} tiles in turn, {config['num_stages']} places are no multiple of it"
        yield Violation("stages", 1.0, reason)
    if config["num_stages"] % config["producers"]:
        reason = f"stages: {config['producers']} warps bring tiles in turn, {config['num_stages']} places are no multiple of it"
        yield Violation("stages", 1.0, reason)
    if not _workers(config):
        yield Violation("producers", 1.0, "producers: one of the four warps prepares queries, one writes gathered logits")
        return
    if config["accumulators"] == 2 and (groups != parts or parts == 1):
        yield Violation(
            "accumulators", 1.0, f"accumulators: two of a group are for several parts, one group each, here are {parts}"
        )
    if config["segments"] != 2 and config["halved"]:
        yield Violation("segments", 1.0, "segments: queries are prepared of a row and of the next")
    yield from exceeds("smem", _smem(spec, config), gpu.smem_per_block, " B")
    # Products, weights and some more of a thread; ptxas wants a product's operands to fit the registers that it starts with.
    columns = min(spec.next_n, 2) * spec.heads
    start, consume = _registers(config)
    yield from exceeds("registers", config["accumulators"] * (columns / 2 + 4) + columns / 4 + 36, consume)
    yield from exceeds("product's registers", columns / 2 + 26, start)


def _registers(config: Config) -> tuple[int, int]:
    """Registers per thread at the start, when all groups share Hopper's 65536 evenly, and of those that multiply later on."""
    groups = config["groups"]
    start = min(65536 // (128 * (groups + 1)) // 8 * 8, 232)
    return start, min(((groups + 1) * start - _PREPARE_REGISTERS) // groups // 8 * 8, 232)


def _smem(spec: IndexerPagedSpec, config: Config) -> int:
    """Bytes of shared memory: keys, queries of some segments, scales and facts of tiles, weights, sums, barriers."""
    stages, queries, segments = config["num_stages"], spec.next_n, config["segments"]
    operands = sum(_widths(spec, config)) * spec.head_dim
    facts = queries * (4 * spec.heads + (8 if config["halved"] else 4)) + 4
    sums = -(-(stages * _PLACE + segments * (operands + facts)) // 16) * 16
    held = 4 * (queries * config["gathered"] * TILE * 4 + 16) if config["gathered"] else 0
    behind = 8 * queries * spec.head_dim * 4 if config["halved"] else 280  # sums of parts of the heads, or of tiles
    return sums + behind + held + 16 * stages + 16 * segments


def _workers(config: Config) -> int:
    """Warps that prepare a segment; another one writes logits where they are gathered."""
    return 4 - config["producers"] - (1 if config["gathered"] else 0)


def _widths(spec: IndexerPagedSpec, config: Config) -> list[int]:
    """Columns of each part's product: the heads of two queries or of one, and eight for the pieces of their weighted sums."""
    return [min(spec.next_n - query, 2) * spec.heads + (8 if config["halved"] else 0) for query in range(0, spec.next_n, 2)]


def derived(spec: IndexerPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    widths = _widths(spec, config)
    return {
        "parts": len(widths),
        "workers": _workers(config),
        "page_bits": spec.page.bit_length() - 1,
        "threads": 128 * (config["groups"] + 1),
        "smem": _smem(spec, config),
        "consumer_registers": _registers(config)[1],
        "producer_registers": _PREPARE_REGISTERS,
    }
