"""Few heads in CUDA C++: parts of tiles in a ring, two groups that each have a query; its shared memory, names, constraints."""

from __future__ import annotations

from collections.abc import Iterable

from ...problem.channels import D_V, usual
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar
from .. import pair
from . import parameters, sweep
from .problem import AttentionSpec, sharing

HEADS = 32
"""At most: of 64 the output would not fit the registers of a group."""
# H100, 4096 x 32768: 1297, 1338 and 1645 µs of 8, 16 and 32 heads where TileLang's kernel takes 2048, 2021 and 2134. As many
# stages as fit: of 16 heads 7 take 1338, 6 1377, 5 1655.
_STAGES = (13, 11, 9, 8, 7, 6, 5)
_MASKS = 8  # of tiles in the ring; of narrow ones there are more
_NARROW = 256  # channels of value, with which a tile is one part of the ring
_TOKEN_BITS = 28  # of an entry of a union; a cache of as many tokens would have 300 GB
_UNITERS = 512  # threads that join the lists of neighbouring queries
_UNITED_EACH = (1, 2, 4)  # entries of a list that each of them keeps in registers; of longer lists none
_TABLE = 1 << 13  # words, of as many bits for tokens that they look at together
_NEAR_BYTES = 44 << 20  # of latents that an L2 of 50 MB keeps
_BARRIER = 8  # bytes


def rings(spec: AttentionSpec) -> tuple[Config, ...]:
    """The configs to try in turn."""
    registers = 216 if columns(spec) > 16 and usual(spec.d_qk, spec.d_v) else pair.REGISTERS
    return tuple(parameters.cuda(num_stages=stages, consumer_registers=registers) for stages in _STAGES)


def is_narrow(spec: AttentionSpec) -> bool:
    """Whether few heads' channels fit a tile that comes as a whole."""
    return spec.heads <= HEADS and spec.d_v % 64 == 0 and spec.d_v <= _NARROW


def columns(spec: AttentionSpec) -> int:
    """Columns of the products: those of a query, padded, for all queries that share."""
    return sharing(spec.heads, spec.share) * next(count for count in (8, 16, HEADS) if count >= spec.heads)


def constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    """What such blocks cannot do."""
    yield from parameters.no_choice(config, "turns", "interleave", "l2_prefetch", "value_tokens")
    if sharing(spec.heads, spec.share) > 1:
        yield from parameters.no_choice(config, "sweep")
    yield from sweep.constraints(spec, config)
    # One more than a tile has parts. Else a group that waits for its next tile passes while the other's before it has not come
    # yet: the phase before the awaited one looks like it. 3 parts in 3 stages lost the context on an H200, 4 and 6 are right.
    yield from exceeds("stages of a tile", _chunks(spec) + 1, config["num_stages"])
    yield from exceeds("accumulator registers", columns(spec) * spec.d_v / 128 + 88, config["consumer_registers"])


def smem(spec: AttentionSpec, config: Config) -> int:
    """Bytes of shared memory per block, as the template lays it out."""
    width = 64 * _pieces(spec)
    chunk = 128 * width // _chunks(spec)
    q, weights, facts = columns(spec) * width * 2, columns(spec) * 128, columns(spec) * 16
    of_groups = 2 * (q + weights + facts + 2 * _BARRIER)
    return config["num_stages"] * (chunk + 2 * _BARRIER) + of_groups + 8 * _masks(spec) * sharing(spec.heads, spec.share)


def derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    share, chunks = sharing(spec.heads, spec.share), _chunks(spec)
    return {
        **sweep.derived(spec, config),
        "share": share,
        "ragged": spec.lengths or share > 1,
        "token_bits": _TOKEN_BITS,
        "uniters": _UNITERS,
        "table": _TABLE,
        "united_each": next((each for each in _UNITED_EACH if spec.topk <= each * _UNITERS), 0),
        "near_tokens": _NEAR_BYTES // (2 * spec.d_qk),
        "columns": columns(spec),
        "chunks": chunks,
        "chunk_pieces": _pieces(spec) // chunks,
        "masks": _masks(spec),
        "narrow": not usual(spec.d_qk, spec.d_v),
        "registers": pair.REGISTERS,
    }


def _masks(spec: AttentionSpec) -> int:
    return _MASKS if usual(spec.d_qk, spec.d_v) else 2 * _MASKS


def _pieces(spec: AttentionSpec) -> int:
    """Pieces of 64 channels, of which the last may have fewer."""
    return -(-spec.d_qk // 64)


def _chunks(spec: AttentionSpec) -> int:
    """Parts of a tile: 3 of 192 channels, or 4 of 128; of narrow ones the whole."""
    if not usual(spec.d_qk, spec.d_v):
        return 1
    return 3 if spec.d_qk > D_V else 4
