"""Paged attention in CUDA C++: clusters of two blocks that split the channels, each with rows or parts of rows in turn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ...gpu import Gpu
from ...kernels.waves import until_done
from ...problem import channels
from ...problem.kv_layouts import KvPlainLayout
from ...problem.op import Config, Inputs, Launch, Outputs, Violation
from ...problem.paged import FIXED, divider, scales_of
from ...problem.values import Scalar, lower, upper
from . import shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

_THREADS = 384  # two groups of 128 multiply, one gathers
_REGISTERS = {"consumer_registers": 216, "producer_registers": 72}  # per thread; 3 * 168 of a block
_STAGES = (4, 3)  # tiles that are gathered, waiting or in use, as many as fit
_STAGED = 4 * 16 * 4 + 8  # bytes of a token on their way: four words of each of four threads, scales
_STAGED_ROPE = 16 * 4  # of them more where rotary channels follow: a word of each
_SCALES = (("e8m0", 32), ("fp32", 128))  # of rows without rotary part: 8 bytes for each block
_HEADS = 64  # of a group; up to so many both groups take all heads, of every second tile
_HANDED = 33 * 128 * 16  # bytes that one then hands to the other
_LEAST_ROWS = 9  # from which on clusters serve more than 64 heads where no record says otherwise
_ROWS, _FEW_ROWS, _FEW_HEADS = 16, 8, 16  # and rows without rotary part, which with more heads pay earlier
_START, _ERRAND = 1.5, 0.5  # tiles that pass before a cluster's first, and on its way to another row
_JOINING, _JOINING_MB = 1.0, 0.45  # that joining takes, and for every MB of parts
_COMBINERS = 128  # threads that join the parts of a row and head
_HOPPER_SMEM = 232448  # bytes of a block


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do."""
    for name in ("interleave", "sweep"):
        if config[name]:
            yield Violation(name, 1.0, f"{name}: clusters have no choice")
    yield from whole_rows("clusters", spec, gpu)


def whole_rows(name: str, spec: AttentionPagedSpec, gpu: Gpu) -> Iterable[Violation]:
    """What no kernel of Hopper's that reads tokens of 512 channels can do, as the parameter ``name`` says it."""
    if gpu.capability != 90:
        reason = f"capability: the CUDA template is Hopper's, {gpu.name} is sm_{gpu.capability}"
        yield Violation("capability", 1.0, reason)
    if not halves(spec):
        reads = "v32, v4 and rows of 512 channels without rotary part"
        yield Violation("layout", 1.0, f"layout: {name} read {reads}, Triton's {spec.kv_layout}")


def halves(spec: AttentionPagedSpec) -> bool:
    """Whether a token can be split: 256 channels with their scales for each block, and half of the rotary part."""
    layout = spec.layout
    if spec.kv_layout in FIXED or isinstance(layout, KvPlainLayout):
        return spec.kv_layout in FIXED
    return layout.d_nope == channels.D_V and not layout.d_rope and (scales_of(layout), layout.group) in _SCALES


def pay(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> bool:
    """Whether in the sizes' bucket clusters are known to take less than Gluon's blocks of 64 heads, or Triton's.

    On an H200 with 128 heads and k 2048 over 656 bytes 25.2 µs against 28.1 at 9 rows, 29.4 against 33.8 at 12, 30.4 against
    36.5 at 16, 36 against 43 at 18; with 64 heads 57 and 63 at 64 rows, where each has a cluster of its own, 28 against 26 at
    16, 110 against 99 at 128. Of 528 bytes with 64 heads 16 against Triton's 13 at one row, 17 against 22 at 8, 20 against 99
    at 64; with 8 heads 15 against 13 at 8.
    """
    bucket, clusters = sizes.bucket(), gpu.sms // 2
    least = max(lower(bucket, "batch"), 1) * max(lower(bucket, "next_n"), 1)
    if spec.general:
        most = upper(bucket, "batch") * upper(bucket, "next_n")
        return bool(spec.extra_topk) or most >= (_FEW_ROWS if spec.heads > _FEW_HEADS else _ROWS)
    if spec.heads > _HEADS:
        return max(least, lower(bucket, "rows")) >= _LEAST_ROWS
    return spec.heads > _HEADS // 2 and clusters // 2 < least <= clusters and upper(bucket, "batch") <= clusters


def derived(spec: AttentionPagedSpec) -> dict[str, Scalar]:
    """Names for the template."""
    layout = spec.layout
    d_qk = layout.d_nope + layout.d_rope
    stages = next(stages for stages in _STAGES if _smem_with_staging(spec, stages) <= _HOPPER_SMEM)
    return {
        "d_qk": d_qk,
        "half": layout.d_v // 2,
        "half_tail": (d_qk - layout.d_v) // 2,
        "turns": True,
        "num_stages": stages,
        "threads": _THREADS,
        "smem": _smem(spec, stages),
        "smem_with_staging": _smem_with_staging(spec, stages),
        "combine_threads": _COMBINERS,
        **_REGISTERS,
    }


def _smem(spec: AttentionPagedSpec, stages: int) -> int:
    """Bytes of shared memory per block: half of the channels of tiles and of q, mail, masks, barriers."""
    tile, mailbox, barrier = shared.TILE * (spec.layout.d_nope + spec.layout.d_rope), 2048 + 1024 + 128, 8
    q = -(-spec.heads // _HEADS) * tile
    return stages * (tile + 8 + 2 * barrier) + q + 2 * barrier + 8 * (mailbox + 2 * barrier)


def _smem_with_staging(spec: AttentionPagedSpec, stages: int) -> int:
    """The same with a tile of the cache's bytes on their way."""
    staged = _STAGED + (_STAGED_ROPE if spec.layout.d_rope else 0)
    return -(-_smem(spec, stages) // 16) * 16 + shared.TILE * staged


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Clusters that stay, each with one row or part of a row after another; then the parts are joined."""
    q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
    rows = q.shape[0] * q.shape[1]
    clusters, whole, splits, share = _equal(spec, rows, config["splits"], gpu) if config["splits"] else dealt(spec, rows, gpu)
    count = (rows - whole) * spec.heads * splits if splits > 1 else 0
    parts = torch.empty(count * _part_bytes(spec), dtype=torch.uint8, device=q.device)
    facts = torch.empty(count, 4, dtype=torch.float32, device=q.device)  # log2 of the sum, a power of two for each block
    sink = (inputs["sink"],) if spec.sink else ()
    tensors, scalars = shared.arguments(spec, inputs, (q, sink, (out, lse, parts, facts)))
    grid = (2 * clusters, 1, 1)
    scratch = (q.new_empty(grid[0] * _HANDED // 2),) if spec.heads <= _HEADS else ()
    main = Launch("attention_paged", grid, (*tensors, *scratch, *scalars, splits, inputs["sm_scale"], whole, rows, share))
    if splits == 1:
        return (main,)
    joined = (*sink, parts, facts, out, lse, splits, whole, _tiles(spec), share, *divider(share or 1))
    return (main, Launch("combine", ((rows - whole) * spec.heads, 1, 1), joined))


class Dealt(NamedTuple):
    """What clusters take of rows."""

    clusters: int
    """That run, at most as many as there is room for."""
    whole: int
    """Rows that a cluster takes whole, one after another."""
    splits: int
    """Parts of each other row; where clusters have equal shares of these, places for parts."""
    share: int
    """Tiles of the other rows that each cluster takes, one row's behind another's; 0: each row has equal parts."""


def _equal(spec: AttentionPagedSpec, rows: int, splits: int, gpu: Gpu, whole: int = 0) -> Dealt:
    """Rows in equal parts, as many as their memory allows."""
    splits = min(splits, shared.most_splits(spec, rows - whole or 1))
    return Dealt(min(whole + (rows - whole) * splits, _clusters(gpu)), whole, splits, 0)


@functools.lru_cache(maxsize=1 << 12)
def dealt(spec: AttentionPagedSpec, rows: int, gpu: Gpu) -> Dealt:
    """Rows whole, in equal parts or in equal shares of what is left, so that all end soonest.

    The unit is a tile, 2.2 µs on an H200: a cluster starts in 1.5 and goes on to another row in a half, joining takes one, and
    0.45 for every MB of parts. Of 39 measured numbers of rows that chooses within 1 % of the best at 37, 10 % slower at most.
    """
    clusters, tiles, part = _clusters(gpu), _tiles(spec), _part_bytes(spec) * spec.heads
    least = 2 if spec.heads > _HEADS else 3  # of the longest part: fewer are filled up, to two of each group

    def joining(parts: int) -> float:
        return _JOINING + _JOINING_MB * parts * part / 1e6 if parts else 0

    def duration(shares: tuple[int, int]) -> float:
        whole, splits = shares
        parts = (rows - whole) * splits if splits > 1 else 0
        return until_done(rows, clusters, tiles, whole, splits, start=_START) + joining(parts)

    def fits(shares: tuple[int, int]) -> bool:
        whole, splits = shares
        return splits == 1 or (-(-tiles // splits) >= least and (rows - whole) * splits * part <= shared.PARTIAL_BYTES)

    waves = rows // clusters
    of_waves = (0, max(waves - 1, 0) * clusters, waves * clusters)
    whole, splits = equal = min(filter(fits, itertools.product(of_waves, shared.SPLITS)), key=duration)
    rest = rows - waves * clusters
    share = max(-(-rest * tiles // clusters), least)
    if rest and share < tiles:
        busy = -(-rest * tiles // share)
        end = waves * (_START + tiles) + _START + _ERRAND + share + joining(busy + rest)
        if end < duration(equal):
            return Dealt(clusters if waves else busy, rows - rest, (tiles - 1) // share + 2, share)
    return _equal(spec, rows, splits, gpu, whole)


def _clusters(gpu: Gpu) -> int:
    """That run at once."""
    return max(gpu.sms // 2, 1)


def _tiles(spec: AttentionPagedSpec) -> int:
    """Of a row's lists."""
    return -(-spec.topk // shared.TILE) + -(-spec.extra_topk // shared.TILE)


def _part_bytes(spec: AttentionPagedSpec) -> int:
    """Of what a part leaves of a head: fp16."""
    return 2 * spec.layout.d_v
