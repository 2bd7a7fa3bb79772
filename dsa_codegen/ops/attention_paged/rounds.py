"""Paged attention in CUDA C++ for few rows of many heads: blocks that load a tile at once, for 64 heads after 64 heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...gpu import Gpu
from ...problem import channels
from ...problem.op import Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Bucket, Scalar, upper
from . import clusters, shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

HEAD_ROUNDS = Parameter(
    "head_rounds",
    (0, 1, 2),
    "rounds of 64 heads in which a block attends to a tile that it loads all at once; a kernel joins parts; 0: other kernels",
    before=0,
)
TILES = 64, 96, 128  # tokens
TILE_TOKENS = Parameter(
    "tile_tokens", TILES, "tokens of a tile of head_rounds, which is all that a block takes", before=TILES[-1]
)
_HEADS = 64  # of a round
_WIDTHS = 16, 32  # of products whose columns are heads, where there are no more
_THREADS = 512
_WARPS = _THREADS // 32
_JOIN_THREADS = 128
_PARTS, _FEW_PARTS = 16, (8, 12)  # whose loads a thread of `join` has on their way together
_THREADS_OF_REGISTERS = 640
"""In one round: 96 registers for each, and some for a block that joins: 15.05 instead of 15.4 us for 8 rows of 64 heads on an
H200. In two rounds all registers: 18.07 instead of 18.36 us for 5 rows of 128."""
_FEWEST_ENTRIES, _MOST_ENTRIES = 512, 4096  # of lists
_MOST_BLOCKS = 528  # four waves
_CLUSTER = 2  # blocks, whose parts become one


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What such blocks cannot do: rows have 512 channels of which none or 64 are rotary, and rounds have heads."""
    yield from clusters.whole_rows("head_rounds", spec, gpu)
    for name in ("splits", "sharers", "columns", "flat", "interleave", "sweep"):  # a block has one tile: splits follow
        yield from exceeds(f"{name} beside head_rounds", int(config[name]), 0)
    yield from exceeds("head_rounds", config["head_rounds"], _head_blocks(spec))
    if _width(spec) and config["tile_tokens"] % _HEADS:
        yield Violation("tile_tokens of few heads", 1, "where heads are columns, products have 64 tokens")


def reach(spec: AttentionPagedSpec, config: Config, bucket: Bucket) -> Iterable[Violation]:
    """Few rows: not many more blocks than run at once."""
    rows = upper(bucket, "batch") * upper(bucket, "next_n")
    blocks = rows * _groups(spec, config) * _splits(spec, config["tile_tokens"])
    yield from exceeds("blocks of head_rounds", blocks, _MOST_BLOCKS)


def best(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> tuple[int, int]:
    """(rounds, tokens of a tile) that serve so many rows best; 0 rounds where other kernels are known to take less.

    All blocks run at once, each with its 64 heads, or with 128 in two rounds, and the smallest tiles of which that holds are
    best: on an H200 18.0 instead of 19.3 us for 5 rows of 128 heads in tiles of 96 tokens, 11.75 instead of 13.0 for 4 rows
    of 64 in tiles of 64.
    """
    if not _FEWEST_ENTRIES <= spec.topk + spec.extra_topk <= _MOST_ENTRIES:
        return 0, TILES[-1]
    for rounds in range(1, _head_blocks(spec) + 1):
        for tokens in TILES:
            fits = _blocks(spec, sizes, rounds, tokens) <= gpu.sms
            if fits and not (_width(spec) and tokens % _HEADS):
                return rounds, tokens
    return 0, TILES[-1]


def fill(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> bool:
    """Whether one round of the smallest tiles is better than any other kernel, as its blocks fill half of the SMs or all.

    On an H200 9.6 beside 9.8 us of clusters for a row of 128 heads (64 blocks), 10.3 and 11.5 for 8 rows of 64 with k 640
    (80), but 9.4 and 8.8 for 4 (40). With up to 32 heads 9.5 and 10.0 for 4 rows (128), but 8.5 and 8.2 for 2 (64).
    """
    needed = gpu.sms // 2 + 1 if _width(spec) else gpu.sms * 12 // 25
    return best(spec, sizes, gpu) == (1, TILES[0]) and _blocks(spec, sizes, 1, TILES[0]) >= needed


def _blocks(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, rounds: int, tokens: int) -> float:
    """Blocks of as many rows as the sizes' bucket has at most."""
    rows = upper(sizes.bucket(), "batch") * upper(sizes.bucket(), "next_n")
    return rows * _splits(spec, tokens) * -(-_head_blocks(spec) // rounds)


def derived(spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    return {
        "d_qk": spec.d_qk,
        "head_blocks": _head_blocks(spec),
        "threads": _THREADS,
        "width": _width(spec),
        "join_threads": _JOIN_THREADS,
        "join_at_once": _together(spec, config),
        "threads_of_registers": _THREADS if config["head_rounds"] > 1 else _THREADS_OF_REGISTERS,
        "smem": _smem_of_columns(spec, config["tile_tokens"]) if _width(spec) else _smem(spec, config),
    }


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs) -> Sequence[Launch]:
    """A block for each share of a row and its rounds of heads; parts of two each are joined behind them."""
    q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
    rows = q.shape[0] * q.shape[1]
    splits, joined, units = _splits(spec, config["tile_tokens"]), _joined(spec, config), rows * _head_blocks(spec)
    heads = _width(spec) or _HEADS
    pieces = _WARPS * heads // 8  # of a part, one a warp
    if config["head_rounds"] > 1:  # blocks leave their own parts of the first round, which two groups of warps join
        count, blocks = rows * (splits + joined), rows * pieces * 3 // 4
    else:
        count, blocks = units * joined, units * pieces // 4
    parts = torch.empty(count * heads * channels.D_V * 2, dtype=torch.uint8, device=q.device)
    facts = torch.empty(count * 2 * (heads + _WARPS), dtype=torch.float32, device=q.device)
    tensors, scalars = shared.arguments(spec, inputs, (q, (), (parts, facts)))
    grid = (rows * _groups(spec, config) * splits, 1, 1)
    sink = (inputs["sink"],) if spec.sink else ()
    return (
        Launch("attention_paged", grid, (*tensors, *scalars, splits, inputs["sm_scale"])),
        Launch("join", (blocks, 1, 1), (*sink, parts, facts, out, lse, joined)),
    )


def _splits(spec: AttentionPagedSpec, tokens: int) -> int:
    """Shares of a row, of a tile at most, in whole clusters."""
    return _CLUSTER * -(-(spec.topk + spec.extra_topk) // (_CLUSTER * tokens))


def _joined(spec: AttentionPagedSpec, config: Config) -> int:
    """Parts of a row that clusters leave."""
    return _splits(spec, config["tile_tokens"]) // _CLUSTER


def _together(spec: AttentionPagedSpec, config: Config) -> int:
    """Parts whose loads a thread of `join` has on their way at a time.

    Fewer would be enough in one round as well, but then an SM takes more of its blocks, and others none: 15.25 instead of
    15.1 us for 8 rows of 64 heads on an H200.
    """
    fitting = [together for together in _FEW_PARTS if _joined(spec, config) <= together]
    return min(fitting, default=_PARTS) if config["head_rounds"] > 1 else _PARTS


def _head_blocks(spec: AttentionPagedSpec) -> int:
    return -(-spec.heads // _HEADS)


def _groups(spec: AttentionPagedSpec, config: Config) -> int:
    """Blocks that share a row and a part of its entries."""
    return -(-_head_blocks(spec) // config["head_rounds"])


def _width(spec: AttentionPagedSpec) -> int:
    """Columns of all products, where heads are columns: too few to be their rows."""
    return next((width for width in _WIDTHS if spec.heads <= width), 0)


def _smem_of_columns(spec: AttentionPagedSpec, tokens: int) -> int:
    """Bytes of shared memory per block: tile, q, weights, scores by some of the channels, softmax, a mask, facts, barriers."""
    width = _width(spec)
    tile, q, weights = 2 * spec.d_qk * tokens, 2 * spec.d_qk * width, 2 * width * tokens
    scores = _WARPS // 4 // (tokens // 64) * 4 * width * (tokens + 4)
    softmax, sent_facts, barriers = 8 * width, (width // 2 + _WARPS) * 16, 3 * 8
    return tile + q + weights + scores + softmax + tokens // 2 + sent_facts + barriers


def _smem(spec: AttentionPagedSpec, config: Config) -> int:
    """Bytes of shared memory per block: tile, q and weights (where q's last 64 channels are), maxima, totals, a mask, mail."""
    tokens, rounds = config["tile_tokens"], config["head_rounds"]
    tile, q, weights = 2 * spec.d_qk * tokens, 2 * channels.D_V * _HEADS, 2 * _HEADS * -(-tokens // 64) * 64
    if rounds > 1 and not (spec.d_qk > channels.D_V and 2 * 64 * tokens >= weights):  # else the last ones lie in the tile
        weights *= 2
    tails = 2 * rounds * (spec.d_qk - channels.D_V) * _HEADS  # of q: they lie where weights come
    weights = max(weights, tails)
    sent_facts, barriers = (_HEADS // _CLUSTER + _WARPS) * 16, (2 + rounds) * 8  # what the other block sends lies where q was
    return tile + q + weights + rounds * 2 * 2 * 4 * _HEADS + tokens // 2 + sent_facts + barriers
