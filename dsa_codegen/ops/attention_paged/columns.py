"""Paged attention in CUDA C++ for few rows, heads as columns: a cluster's blocks have all their tokens on the way at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Bucket, Scalar, upper
from . import clusters, shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

_COLUMNS = (16, 32)
_LEAST = 16  # of a product
COLUMNS = Parameter(
    "columns",
    (0, 8, *_COLUMNS),
    "heads of a block as columns of all products; without sharers tokens stream through it; 0: 64 heads as rows, by roles",
    before=0,
)
_MOST_BLOCKS = 160
_SMS = 132
_AT_ONCE = {16: 7, 10: 7, 8: 15, 6: 17, 5: 22}  # clusters of so many blocks that an H200 runs at once, as its driver says
_THREADS = 512
_WARPS = _THREADS // 32
_TILES = (64, 128)  # tokens


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What such clusters cannot do: rows have 512 channels of which none or 64 are rotary."""
    yield from clusters.whole_rows("columns", spec, gpu)
    for name in ("splits", "flat", "interleave", "sweep"):
        yield from exceeds(f"{name} beside columns", int(config[name]), 0)
    yield from exceeds("columns beside heads", config["columns"], _most_columns(spec))


def reach(spec: AttentionPagedSpec, config: Config, bucket: Bucket) -> Iterable[Violation]:
    """Few rows: not many more blocks than run at once."""
    rows = upper(bucket, "batch") * upper(bucket, "next_n")
    yield from exceeds("blocks of sharers", rows * _head_blocks(spec, config) * config["sharers"], _MOST_BLOCKS)


def best(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> tuple[int, int]:
    """(sharers, columns) that serve the rows of the sizes' bucket best; (0, 0) where other kernels are known to take less.

    A block has one tile, so that no load waits for another, and all clusters run at once. Few columns are better than many, as
    less is exchanged, then 64 tokens than 128, then few parts than many.
    """
    rows = upper(sizes.bucket(), "batch") * upper(sizes.bucket(), "next_n")
    for columns in _COLUMNS:
        clusters = rows * -(-spec.heads // columns)
        fitting = [sharers for sharers, most in _AT_ONCE.items() if clusters <= most * gpu.sms // _SMS]
        shares = {sharers: -(-(spec.topk + spec.extra_topk) // sharers) for sharers in fitting}
        one_tile = [sharers for sharers, share in shares.items() if share <= _TILES[-1]]
        if one_tile and columns <= _most_columns(spec):
            return min([sharers for sharers in one_tile if shares[sharers] <= _TILES[0]], default=max(one_tile)), columns
    return 0, 0


def _most_columns(spec: AttentionPagedSpec) -> int:
    return max(_COLUMNS[0], 2 * spec.heads - 1)


def derived(spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    units = 2 * -(-min(spec.heads, config["columns"]) // 2)
    owned = -(-units // config["sharers"])
    tokens = _tokens_of_tile(spec, config)
    return {
        "d_qk": spec.d_qk,
        "width": _width(config),
        "head_blocks": _head_blocks(spec, config),
        "tokens_of_tile": tokens,
        "units": units,
        "owned": owned,
        "threads": _THREADS,
        "smem": _smem(spec, config, tokens, owned),
    }


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs) -> Sequence[Launch]:
    """A cluster for each row and ``columns`` heads."""
    q = inputs["q"]
    sink = (inputs["sink"],) if spec.sink else ()
    tensors, scalars = shared.arguments(spec, inputs, (q, sink, (outputs["out"], outputs["lse"])))
    blocks = q.shape[0] * q.shape[1] * _head_blocks(spec, config) * config["sharers"]
    return (Launch("attention_paged", (blocks, 1, 1), (*tensors, *scalars, inputs["sm_scale"])),)


def _head_blocks(spec: AttentionPagedSpec, config: Config) -> int:
    return -(-spec.heads // config["columns"])


def _width(config: Config) -> int:
    """Columns of a product, of which heads may leave some empty."""
    return max(config["columns"], _LEAST)


def _tokens_of_tile(spec: AttentionPagedSpec, config: Config) -> int:
    """128 where a share has more than 64 entries."""
    return _TILES[-(-(spec.topk + spec.extra_topk) // config["sharers"]) > _TILES[0]]


def _smem(spec: AttentionPagedSpec, config: Config, tokens: int, owned: int) -> int:
    """Bytes of shared memory per block: tile, q, weights, scores or parts that come in, what belongs to them, a barrier."""
    heads, sharers = _width(config), config["sharers"]
    tile, q, weights = 2 * spec.d_qk * tokens, 2 * spec.d_qk * heads, 2 * heads * tokens
    scores = 4 * heads * (tokens + 4) * _WARPS // 4 // (tokens // 64)
    behind = sharers * (16 * owned + 4 * _WARPS) + 4 * heads + tokens // 2 + 8
    return tile + q + weights + max(scores, 1024 * sharers * owned) + behind
