"""Pairs of tiles in CUDA C++: blocks of 64 heads whose two groups score a tile each, or two of FP8, of half the bytes."""

from __future__ import annotations

from collections.abc import Iterable

from ...problem.channels import D_V
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar
from .. import pair
from . import parameters, staying, sweep
from .problem import AttentionSizes, AttentionSpec

# 64 and 128 heads, H200, 4096 queries: 1747 and 3393 µs of 8192 tokens, 1910 and 3944 of 32768. Of 131072 64 heads take 2551,
# and interleaved 2514; 128 heads 4312 and 4551, but 4252 and 4122 on another card. Of lines of 128 bytes 64 heads of 131072
# take 2459, 2561 without, interleaved 2466 and 2524; 128 heads 4463 and 4348. Gatherers of fewer than 72 registers spill.
# Own values 16 tokens at a time, alone: 128 heads of 8K, 32K, 128K 3626, 3714, 4105 µs (3703, 3921, 4261 of a whole tile), 64
# heads of 32K 1938 (2006); 32 at a time 3584, 3834, 4162, 1947.
CONFIG = parameters.cuda(num_stages=2, consumer_registers=216, value_tokens=16)
LEAST_TOPK = 512
"""Of lists that are known to gain; shorter ones were not measured."""
# 64 and 128 heads: tiles of half the bytes, so that two for each group fit. H200, 128 heads, 4096 queries of 32K tokens:
# 2670 µs, where FlashMLA's products of bf16 take 4213.
FP8 = parameters.cuda(num_stages=4, consumer_registers=216)
_BARRIER = 8  # bytes


def best(spec: AttentionSpec, sizes: AttentionSizes) -> Config:
    """The config for lists as they come."""
    far = sizes.tokens >= sizes.EDGES["tokens"][-1] and spec.heads == pair.HEADS
    lines = far and spec.d_qk > D_V  # rows that are no multiple of 256 bytes
    return CONFIG.replace(interleave=far and not spec.batch_invariant, l2_prefetch=parameters.LINE if lines else 256)


def constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    """What such blocks cannot do."""
    yield from parameters.no_choice(config, "turns")
    yield from sweep.constraints(spec, config)
    if spec.heads % pair.HEADS:
        yield Violation("heads", 1.0, f"heads: a block takes {pair.HEADS}, of which {spec.heads} are no multiple")
    yield from exceeds("accumulator registers", 216, config["consumer_registers"])


def fp8_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    """The same of FP8 products."""
    yield from parameters.no_choice(config, "interleave", "l2_prefetch", "sweep", "value_tokens")
    yield from constraints(spec, config)
    if config["num_stages"] != FP8["num_stages"]:
        yield Violation("num_stages", 1.0, f"num_stages: places of tiles are built for {FP8['num_stages']}")


def smem(spec: AttentionSpec, config: Config) -> int:
    """Bytes of shared memory per block."""
    return pair.smem(spec.d_qk, spec.max_logits)


def fp8_smem(spec: AttentionSpec, config: Config) -> int:
    """Tiles, their scales and masks; q; of four tiles weights and changes; facts of heads."""
    of_tiles = config["num_stages"] * (64 * (spec.d_qk + 12) + 8 + 2 * _BARRIER)
    return of_tiles + 64 * spec.d_qk + 4 * (64 * 64 + 256 + 16 + _BARRIER) + 6 * 256 + 4 * _BARRIER


def derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    lines = config["l2_prefetch"] == parameters.LINE
    options = {
        "max_logits": spec.max_logits,
        "divides": staying.divides(spec),
        "lines": lines,
        "value_tokens": config["value_tokens"],
    }
    return {**pair.derived(spec.d_qk, config["consumer_registers"], **options), **sweep.derived(spec, config)}
