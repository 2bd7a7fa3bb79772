"""Paged attention in CUDA C++ for few rows: the blocks of a cluster share a row's entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Bucket, Scalar, lower, upper
from . import clusters, shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

SHARERS = Parameter(
    "sharers",
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 16),
    "blocks of a cluster that share a row's entries; 1: each SM has a share of all rows; 0: two blocks split the channels",
    before=0,
)
_HEADS = 64  # of a block
_MOST_BLOCKS = 160
_SMS = 132
_LEAST_PAIRS = 56  # rows up to which all SMs share them evenly instead
_AT_ONCE = {3: 39, 5: 22, 6: 17, 8: 15, 16: 7}  # clusters of so many blocks that an H200 runs at once, as its driver says
_FEW_ENTRIES, _FEW_HEADS = 1024, 32  # of lists for which clusters are known to win, and heads from which on
_THREADS = 512  # four groups: two make tiles, two multiply
_REGISTERS = {"lead_registers": 208, "follow_registers": 160, "make_registers": 72}  # per thread; 4 * 128 of a block


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What such clusters cannot do: they take whole rows of the lists, and tokens with a rotary part or 512 channels."""
    yield from clusters.whole_rows("sharers", spec, gpu)
    for name in ("splits", "flat", "interleave", "sweep"):
        yield from exceeds(f"{name} beside sharers", int(config[name]), 0)


def reach(spec: AttentionPagedSpec, config: Config, bucket: Bucket) -> Iterable[Violation]:
    """Few rows: not many more blocks than run at once, where they meet."""
    yield from exceeds("blocks of sharers", _most_clusters(spec, bucket) * config["sharers"], _MOST_BLOCKS)


def best(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> int:
    """Into how many shares the rows of the sizes' bucket are best cut; 0 where other kernels are known to take less.

    On an H200 with k 640 over 584 bytes, beside the best of the others: 128 heads 9.9 µs and 13.8 at one row, 13.6 and 18.2 at
    8, 19.8 and 22.9 at 16; 64 heads 9.9 and 13.8, 13.1 and 15.1, 13.9 and 18.5. With k 2048 over 656 bytes 14.3 and 14.4 at one
    row of 128 heads, more than Gluon's elsewhere.
    """
    if pays_in_pairs(spec, sizes.bucket()):
        return 2
    if spec.topk + spec.extra_topk > _FEW_ENTRIES or spec.heads <= _FEW_HEADS:
        return 0
    clusters = _most_clusters(spec, sizes.bucket())
    return max((sharers for sharers, most in _AT_ONCE.items() if clusters <= most * gpu.sms // _SMS), default=0)


def pays_in_pairs(spec: AttentionPagedSpec, bucket: Bucket) -> bool:
    """Whether two blocks for each row are known to take less than even shares, where those are nearly halves.

    On an H200 with 64 heads and k 2048 over 656 bytes 49.8 µs and 54.3 at 66 rows, 49.7 and 53.9 at 64; 48.3 and 45.4 at 48.
    """
    least, most = lower(bucket, "batch") * max(lower(bucket, "next_n"), 1), upper(bucket, "batch") * upper(bucket, "next_n")
    suits = _in_pairs(spec, 2) and _FEW_HEADS < spec.heads <= _HEADS and spec.topk + spec.extra_topk > _FEW_ENTRIES
    return suits and least > _LEAST_PAIRS and most <= _SMS // 2


def _most_clusters(spec: AttentionPagedSpec, bucket: Bucket) -> float:
    return upper(bucket, "batch") * upper(bucket, "next_n") * _head_blocks(spec)


def derived(spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    return {
        "d_qk": spec.d_qk,
        "apart": shared.apart(spec),
        "scale_bytes": shared.scale_bytes(spec),
        "head_blocks": _head_blocks(spec),
        "joined": _joined(spec),
        "owned": -(-_joined(spec) // config["sharers"]),
        "threads": _THREADS,
        "smem": _smem(spec, config["sharers"], -(-_joined(spec) // config["sharers"])),
        "in_pairs": _in_pairs(spec, config["sharers"]),
        **_REGISTERS,
    }


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs) -> Sequence[Launch]:
    """A cluster for each row and 64 heads."""
    q = inputs["q"]
    sink = (inputs["sink"],) if spec.sink else ()
    tensors, scalars = shared.arguments(spec, inputs, (q, sink, (outputs["out"], outputs["lse"])))
    clusters = q.shape[0] * q.shape[1] * _head_blocks(spec)
    return (Launch("attention_paged", (clusters * config["sharers"], 1, 1), (*tensors, *scalars, inputs["sm_scale"])),)


def _head_blocks(spec: AttentionPagedSpec) -> int:
    return -(-spec.heads // _HEADS)


def _joined(spec: AttentionPagedSpec) -> int:
    """Heads of a block that its cluster joins: whole warps' 16."""
    return next(heads for heads in (16, 32, _HEADS) if spec.heads <= heads or heads == _HEADS)


def _smem(spec: AttentionPagedSpec, sharers: int, owned: int) -> int:
    """Bytes of shared memory per block: tiles, q or the parts that come in, weights, facts, what rescales, barriers."""
    tile, part = 2 * shared.TILE * spec.d_qk, owned * 2 * spec.layout.d_v
    weights, facts, keep, barriers = 2 * shared.TILE * _HEADS, 32 * sharers * owned, 4 * _HEADS, 2 * (8 + 3 * 8) + 3 * 8
    if _in_pairs(spec, sharers):
        barriers += 2 * 8 * 8 + 2 * 8
    return 2 * tile + max(tile, sharers * part) + weights + facts + keep + barriers


def _in_pairs(spec: AttentionPagedSpec, sharers: int) -> bool:
    """Whether two blocks share a row whose tokens have their fields side by side."""
    return sharers == 2 and not shared.apart(spec)
