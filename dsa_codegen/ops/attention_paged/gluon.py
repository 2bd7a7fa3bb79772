"""Paged attention in Gluon: groups with roles in blocks of 64 heads, which take rows whole or share them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...kernels.waves import until_done
from ...problem.op import Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.paged import FIXED, group_of
from ...problem.values import Scalar
from . import shared
from .problem import AttentionPagedSpec

PARAMETERS = (
    Parameter("splits", (0, *shared.SPLITS), "blocks that share a row's entries; 0: as many as end soonest", launch_only=True),
)
CONFIG = Config.of("gluon", splits=0)
_PARTS = 8  # of a step of `combine`, whose program has all channels
# Per thread: together they fill the register file, lead takes 208. The accumulators are 128 of them.
_REGISTERS = {"registers": 128, "follow_registers": 160, "produce_registers": 72}


def constraints(spec: AttentionPagedSpec, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do."""
    if gpu.capability != 90:
        reason = f"capability: the Gluon template is Hopper's, {gpu.name} is sm_{gpu.capability}"
        yield Violation("capability", 1.0, reason)
    if spec.kv_layout not in FIXED:
        reason = f"layout: the Gluon template reads v32 and v4, Triton's {spec.kv_layout}"
        yield Violation("layout", 1.0, reason)
        return
    yield from exceeds("smem", _smem(spec), gpu.smem_per_block, " B")


def derived(spec: AttentionPagedSpec) -> dict[str, Scalar]:
    """Names for the template."""
    chunks = [f"acc{chunk}" for chunk in range(spec.layout.d_v // group_of(spec.layout))]
    half = len(chunks) // 2
    return {
        "left": ", ".join(chunks[:half]),
        "right": ", ".join(chunks[half:]),
        "head_blocks": _head_blocks(spec),
        "combine_d": shared.COMBINE_D,
        "combine_s": _PARTS,
        "block_h": shared.TILE,
        "block_n": shared.TILE,
        **_REGISTERS,
    }


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Blocks of 64 heads of a row or of a part of one; then the parts are joined."""
    q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
    rows = q.shape[0] * q.shape[1]
    blocks = _head_blocks(spec) * rows
    splits = min(config["splits"], shared.most_splits(spec, rows))
    whole, splits = (0, splits) if splits else _shared_out(spec, blocks, gpu)
    joined = (blocks - whole) * min(spec.heads, shared.TILE)
    partial = shared.partials(spec, joined * splits if splits > 1 else 0, q.device)
    sink = (inputs["sink"],) if spec.sink else ()
    tensors, scalars = shared.arguments(spec, inputs, (q, sink, (out, lse, *partial)))
    grid = (whole + (blocks - whole) * splits, 1, 1)
    main = Launch("attention_paged", grid, (*tensors, *scalars, splits, inputs["sm_scale"], whole))
    if splits == 1:
        return (main,)
    return (main, Launch("combine", (joined, 1, 1), (*sink, *partial, out, lse, splits, whole)))


def _head_blocks(spec: AttentionPagedSpec) -> int:
    return -(-spec.heads // shared.TILE)


@functools.lru_cache(maxsize=1 << 10)
def _shared_out(spec: AttentionPagedSpec, blocks: int, gpu: Gpu) -> tuple[int, int]:
    """(blocks that take all entries of their row, programs that each of the others is split into), so that all end soonest.

    The unit is a tile, 3 µs on an H100: a program starts in 2, joining takes 1, and a quarter for every MB of parts.
    """
    tiles = -(-spec.topk // shared.TILE) + -(-spec.extra_topk // shared.TILE)
    part = 4 * spec.layout.d_v * min(spec.heads, shared.TILE)

    def duration(shares: tuple[int, int]) -> float:
        whole, splits = shares
        joining = 1 + (blocks - whole) * splits * part / 4e6 if splits > 1 else 0
        return until_done(blocks, gpu.sms, tiles, whole, splits, start=2) + joining

    def fits(shares: tuple[int, int]) -> bool:
        whole, splits = shares
        return splits == 1 or (splits <= tiles and (blocks - whole) * splits * part <= shared.PARTIAL_BYTES)

    waves = blocks // gpu.sms
    whole = (0, max(waves - 1, 0) * gpu.sms, waves * gpu.sms)
    return min(filter(fits, itertools.product(whole, shared.SPLITS)), key=duration)


def _smem(spec: AttentionPagedSpec) -> int:
    """Queries and two tiles of bf16 latents, a tile of weights, and less than 2 KB of biases, row values and barriers."""
    return 3 * 2 * shared.TILE * (spec.layout.d_nope + spec.layout.d_rope) + 2 * shared.TILE**2 + 2048
