"""Paged attention in CUDA C++ for many rows: a block for each SM takes rows of 64 heads, and a share of some."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs, Violation, exceeds
from ...problem.paged import divider
from ...problem.values import Scalar, lower, upper
from . import clusters, entries, shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

_HEADS = 64  # of a block
_THREADS = 512  # four groups: two make tiles, two multiply
_JOIN_THREADS = 128
_JOINERS = 8  # blocks that join a unit, each what a warp left
_PARTS = 2  # that a block leaves at most
_REGISTERS = {"lead_registers": 208, "follow_registers": 168, "make_registers": 64}  # per thread; 4 * 128 of a block
_JOINING = 2.0  # tiles that a second kernel takes, and a quarter for every MB of parts
_LEAST = 2  # tiles of a share: fewer cost more than they gain
_SMS = 132
_FEW_HEADS, _FEW_ENTRIES, _FEW_ROWS = 32, 1024, 16  # that other designs are known to serve better
_FEWEST_ROWS = 4  # of long lists, whose parts are too many for a block that joins them: 53 µs and Gluon's 24 with k 16384


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What such blocks cannot do: they read tokens with a rotary part or 512 channels."""
    yield from clusters.whole_rows("sharers", spec, gpu)
    for name in ("splits", "flat", "interleave", "sweep"):
        yield from exceeds(f"{name} beside sharers", int(config[name]), 0)


def best(spec: AttentionPagedSpec, sizes: AttentionPagedSizes) -> bool:
    """Whether such blocks are known to take less than what serves the sizes' bucket else, where that is no design of few rows.

    On an H200 with 64 heads and k 2048 over 656 bytes, beside Gluon's, which shares lists out in equal parts: 23.2 µs and
    25.6 at 16 rows, 45 and 58 at 48, 67 and 94 at 80, 148 and 190 at 200, 433 and 522 at 600. With k 640 over 584 bytes 22.6
    and 25.0 at 32 rows, but 25.1 at 48, where clusters that split the channels take 22.5; 51 and 57 at 148, 88 and 101 at 300.
    Integers were divided then; without that even shares take 3 to 5 % less over 656 bytes.
    """
    bucket = sizes.bucket()
    if spec.heads > _HEADS or (spec.heads <= _FEW_HEADS and not spec.general):
        return False
    rows = max(upper(bucket, "batch"), 1) * max(lower(bucket, "next_n"), 1)
    if spec.general:
        return rows > _SMS // 2
    if spec.topk + spec.extra_topk <= _FEW_ENTRIES:
        return _FEW_ROWS < rows <= _SMS // 4 or rows > _SMS // 2
    return rows > _FEWEST_ROWS and not entries.pays_in_pairs(spec, bucket)


def derived(spec: AttentionPagedSpec) -> dict[str, Scalar]:
    """Names for the template."""
    return {
        "d_qk": spec.d_qk,
        "apart": shared.apart(spec),
        "scale_bytes": shared.scale_bytes(spec),
        "head_blocks": _head_blocks(spec),
        "threads": _THREADS,
        "join_threads": _JOIN_THREADS,
        "smem": _smem(spec),
        **_REGISTERS,
    }


def launches(spec: AttentionPagedSpec, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """As many blocks as there are SMs; where some rows are shared out, their parts are joined."""
    q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
    units = q.shape[0] * q.shape[1] * _head_blocks(spec)
    listed = -(-(inputs["indices"].shape[2] + _extra(inputs)) // shared.TILE)
    blocks, whole, share = dealt(spec, units, listed, gpu)
    left = blocks * _PARTS if share else 0
    parts = torch.empty(left * _HEADS * spec.layout.d_v * 2, dtype=torch.uint8, device=q.device)
    facts = torch.empty(left * _HEADS * 4, dtype=torch.float32, device=q.device)
    sink = (inputs["sink"],) if spec.sink else ()
    tensors, scalars = shared.arguments(spec, inputs, (q, sink, (out, lse, parts, facts)))
    dealing = (units, whole, whole // blocks, share, *divider(listed))
    main = Launch("attention_paged", (blocks, 1, 1), (*tensors, *scalars, inputs["sm_scale"], *dealing))
    if not share:
        return (main,)
    joined = (*sink, parts, facts, out, lse, whole, listed, share, *divider(share))
    return (main, Launch("join", ((units - whole) * _JOINERS, 1, 1), joined))


def _extra(inputs: Inputs) -> int:
    extra = inputs.get("extra_indices")
    return 0 if extra is None else int(extra.shape[2])


@functools.lru_cache(maxsize=1 << 12)
def dealt(spec: AttentionPagedSpec, units: int, listed: int, gpu: Gpu) -> tuple[int, int, int]:
    """(blocks, units that one block has each, tiles of the others that a block takes), so that all end soonest.

    The unit is a tile, 2.4 µs on an H200. Where bits may not depend on the other rows, every row is one block's.
    """
    alone = min(units, gpu.sms), units, 0
    if spec.batch_invariant:
        return alone
    whole = units // gpu.sms * gpu.sms
    rest = (units - whole) * listed
    share = max(-(-rest // gpu.sms), min(_LEAST, listed))
    part = 2 * spec.layout.d_v * min(spec.heads, _HEADS)
    if rest and share < listed:
        busy = -(-rest // share)
        end = whole // gpu.sms * listed + share + _JOINING + (busy + units - whole) * part / 4e6
        if end < -(-units // gpu.sms) * listed:
            return (gpu.sms if whole else busy, whole, share)
    return alone


def _head_blocks(spec: AttentionPagedSpec) -> int:
    return -(-spec.heads // _HEADS)


def _smem(spec: AttentionPagedSpec) -> int:
    """Bytes of shared memory per block: tiles, q, weights, what rescales, masks, barriers."""
    tile, weights, keep, masks = 2 * shared.TILE * spec.d_qk, 2 * shared.TILE * _HEADS, 4 * _HEADS, 2 * 8
    barriers = 2 * 2 + 2 + 4 + 2 * 8  # full by halves, empty; weights and q, each way; of every warp that makes tiles
    return 3 * tile + weights + keep + masks + 8 * barriers
