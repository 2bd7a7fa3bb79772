"""Paged attention in CUDA C++ for few heads: whole tokens stream through blocks, heads as columns; a kernel joins parts.

A block's warps either do everything together, which starts soonest, or some place the next tile while others multiply this one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.paged import divider
from ...problem.values import Scalar, upper
from . import clusters, shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

_THREADS = 512
_WARPS = _THREADS // 32
_JOIN_THREADS = 128
_THREADS_OF_REGISTERS = 640
"""96 registers for each, and some for blocks that join: 11.0 instead of 12.3 µs for 8 rows of 16 heads on an H200."""
_TOKENS = 64  # of a tile
_STAGES = 2  # tiles on their way or waiting
_PITCH = 704  # bytes from token to token there: 64 of two neighbours lie in other banks
_PARTIALS = {16: 4, 32: 2}  # groups that score, each a share of the channels: as many as have room for scores
PLACERS = Parameter(
    "placers",
    (0, 8, 16),
    "beside columns without sharers: warps that make tiles while four others multiply; 0: all do both",
    before=0,
)
_MULTIPLIERS = 4  # warps
_PLACES = 2  # of tiles, where warps have roles
_RING = {8: 2, 16: 1}  # fours of tokens of a warp that places, on their way or waiting
_REGISTERS = {(16, 8): (512, 80, 224), (16, 16): (896, 56, 136), (32, 8): (512, 80, 224), (32, 16): (640, 72, 192)}
"""By columns and placers: threads as which a block begins, registers of those that place and that multiply."""
_FEW_ENTRIES = 640  # of lists that clusters serve as well
_HEADS = 32  # up to which it is known to take less
_ONE_TILE = 4  # rows up to which a block of theirs has a tile, and nothing to do beside placing it
_PLACERS = {16: 16, 32: 8}  # that serve more rows, by columns
_LONG = 4  # tiles of a share from which on all SMs take one, even if fewer would end as soon


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What such blocks cannot do: a token is copied in one piece, so it has all of its fields side by side; of one pool."""
    yield from clusters.whole_rows("columns", spec, gpu)
    if clusters.halves(spec) and (spec.kv_layout != "v32" or spec.extra_topk):
        reads = "two pools" if spec.kv_layout == "v32" else spec.kv_layout
        yield Violation("layout", 1.0, f"layout: columns without sharers read one pool of v32, not {reads}")
    if config["columns"] not in _PARTIALS:
        known = " or ".join(map(str, _PARTIALS))
        yield Violation("columns", 1.0, f"columns: without sharers {known}, not {config['columns']}")
    for name in ("head_rounds", "flat", "interleave", "sweep"):
        yield from exceeds(f"{name} beside columns", int(config[name]), 0)
    yield from exceeds("columns beside heads", config["columns"], max(16, 2 * spec.heads - 1))


def best(spec: AttentionPagedSpec, sizes: AttentionPagedSizes) -> tuple[int, int]:
    """(columns, placers) that serve the sizes' bucket best; (0, 0) where other kernels are known to take less."""
    if spec.kv_layout != "v32" or spec.extra_topk or spec.topk <= _FEW_ENTRIES or spec.heads > _HEADS:
        return 0, 0
    rows = upper(sizes.bucket(), "batch") * upper(sizes.bucket(), "next_n")
    columns = 16 if spec.heads <= 16 or rows == 1 else 32
    return columns, 0 if rows <= _ONE_TILE else _PLACERS[columns]


def derived(spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    if config["placers"]:
        return _derived_of_roles(spec, config)
    return {
        "d_qk": spec.d_qk,
        "head_blocks": _head_blocks(spec, config),
        "stages": _STAGES,
        "pitch": _PITCH,
        "partials": _PARTIALS[config["columns"]],
        "threads": _THREADS,
        "join_threads": _JOIN_THREADS,
        "threads_of_registers": _THREADS_OF_REGISTERS,
        "smem": _smem(spec, config),
    }


def _derived_of_roles(spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
    placers = config["placers"]
    threads, placing, multiplying = _REGISTERS[config["columns"], placers]
    return {
        "d_qk": spec.d_qk,
        "head_blocks": _head_blocks(spec, config),
        "ring": _RING[placers],
        "threads": 32 * (_MULTIPLIERS + placers),
        "join_threads": _JOIN_THREADS,
        "threads_of_registers": threads,
        "placer_registers": placing,
        "multiplier_registers": multiplying,
        "smem": _smem_of_roles(spec, config),
    }


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Blocks with shares of rows and their columns; then the parts of rows that several shared are joined."""
    q, written = inputs["q"], (outputs["out"], outputs["lse"])
    rows = q.shape[0] * q.shape[1]
    units = rows * _head_blocks(spec, config)
    splits = min(config["splits"] or _equal_parts(spec, units, gpu), shared.most_splits(spec, rows))
    roles = bool(config["placers"])
    shares = _shared_out(spec, units, gpu) if roles and not config["splits"] else _cut(units, splits, alone=roles)
    joined = units - shares.whole
    count = joined + shares.blocks if joined else 0  # the numbers of a unit and of a block that shares it, added up
    parts = torch.empty(count * config["columns"] * spec.d_v * 2, dtype=torch.uint8, device=q.device)
    facts = torch.empty(count * (2 * config["columns"] + _WARPS), dtype=torch.float32, device=q.device)
    sink = (inputs["sink"],) if spec.sink else ()
    taken, of_parts = ((units, *shares.of_a_block), shares.of_a_block[:3]) if roles else ((splits,), (splits,))
    tensors, scalars = shared.arguments(spec, inputs, (q, sink if roles else (), (*(written if roles else ()), parts, facts)))
    main = Launch("attention_paged", (shares.blocks, 1, 1), (*tensors, *scalars, *taken, inputs["sm_scale"]))
    if not joined:
        return (main,)
    joining = joined * config["columns"] // 8 * _WARPS * 32 // _JOIN_THREADS
    return (main, Launch("join", (joining, 1, 1), (*sink, parts, facts, *written, *of_parts)))


class Shares(NamedTuple):
    """What blocks take of units, a row and its columns each: whole ones a grid apart, then equal shares of all others."""

    blocks: int
    whole: int
    take: int
    of: int
    """What a block takes of the others: ``take`` of ``of`` parts of the entries of one."""
    grain: int
    """Entries at whose multiples they are cut, a power of two."""

    @property
    def of_a_block(self) -> tuple[int, ...]:
        """As the kernel takes them: beside ``of`` how it divides by it, the grain as a mask."""
        return self.whole, self.take, self.of, *divider(self.of), (1 << 32) - self.grain


def _cut(units: int, splits: int, alone: bool = True) -> Shares:
    """Each unit in as many parts as the others, a block for each; one part is the whole where blocks write rows themselves."""
    return Shares(units, units, 0, 1, 1) if splits == 1 and alone else Shares(units * splits, 0, 1, splits, 1)


@functools.lru_cache(maxsize=1 << 10)
def _shared_out(spec: AttentionPagedSpec, units: int, gpu: Gpu) -> Shares:
    """As many units whole as fill waves of blocks, the others in equal shares of whole tiles; few in equal parts.

    A block goes on to its next unit with tokens already on their way, so that only the longest share counts: on an H200 96
    rows of 16 heads take 55 µs instead of 68 of one block each, 300 rows 150 instead of 198.
    """
    parts = _equal_parts(spec, units, gpu)
    whole = units // gpu.sms * gpu.sms
    others = units - whole
    longest = -(-others * _tiles(spec) // gpu.sms)
    if not whole and -(-spec.topk // (parts * _TOKENS)) <= longest:
        return _cut(units, parts)
    sharing = gpu.sms if longest >= _LONG or not others else -(-others * _tiles(spec) // longest)
    common = math.gcd(others, sharing)
    return Shares(gpu.sms if whole else sharing, whole, others // common, sharing // common, _TOKENS)


def _equal_parts(spec: AttentionPagedSpec, units: int, gpu: Gpu) -> int:
    """Into how many parts all units are cut, so that all blocks run at once."""
    return max(1, min(_tiles(spec), gpu.sms // units))


def _tiles(spec: AttentionPagedSpec) -> int:
    return -(-spec.topk // _TOKENS)


def _head_blocks(spec: AttentionPagedSpec, config: Config) -> int:
    return -(-spec.heads // config["columns"])


def _smem(spec: AttentionPagedSpec, config: Config) -> int:
    """Bytes of shared memory per block: tile, q, weights, scores, tokens as they came, what rescales, a mask, barriers."""
    heads = config["columns"]
    tile, q, weights = 2 * spec.d_qk * _TOKENS, 2 * spec.d_qk * heads, 2 * heads * _TOKENS
    scores = 4 * _PARTIALS[heads] * heads * (_TOKENS + 4)
    staged = _STAGES * _TOKENS * _PITCH
    return tile + q + weights + scores + staged + 4 * heads + _TOKENS // 2 + _STAGES * _WARPS * 8


def _smem_of_roles(spec: AttentionPagedSpec, config: Config) -> int:
    """The same where warps have roles: tiles, q, weights, tokens as they came, peaks, masks, barriers."""
    heads, placers = config["columns"], config["placers"]
    tiles, q, weights = 2 * spec.d_qk * _TOKENS * _PLACES, 2 * spec.d_qk * heads, 2 * heads * _TOKENS
    ring = _RING[placers] * placers
    staged, peaks, masks = ring * 4 * spec.layout.bytes_per_token, 4 * _MULTIPLIERS * heads, _PLACES * _TOKENS // 2
    return tiles + q + weights + staged + peaks + masks + 8 * (ring + 2 * _PLACES)
