"""Clusters in CUDA C++: two blocks share a query's 128 heads, each with half of the channels, whose scores they exchange."""

from __future__ import annotations

from collections.abc import Iterable

from ...problem.channels import D_V
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar
from . import parameters
from .problem import AttentionSpec

# 128 heads, H100: 3864 µs at 4096 x 8192 and 4013 at 32768, where TileLang's takes 8 to 15 % longer. As many tiles as fit.
CONFIGS = tuple(parameters.cuda(num_stages=stages, turns=True, consumer_registers=224) for stages in (4, 3))
LEAST_TOPK = 1024
"""Shorter lists were not measured; between two queries pass 5 to 9 thousand of a query's 110 at 2048."""
_HEADS = 128  # of one query; 64, two queries a cluster, lost to TileLang's
_BARRIER = 8  # bytes


def constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    """What a cluster cannot do."""
    yield from parameters.no_choice(config, "interleave", "l2_prefetch", "sweep", "value_tokens")
    if spec.heads != _HEADS:
        excess = _HEADS / spec.heads - 1
        yield Violation("heads", excess, f"heads: a cluster takes {_HEADS} of one query, not {spec.heads}")
    if spec.max_logits:
        yield Violation("max_logits", 1.0, "max_logits: a cluster keeps powers of two that may lag behind the maxima")
    yield from exceeds("accumulator registers", 216, config["consumer_registers"])


def smem(spec: AttentionSpec, config: Config) -> int:
    """Bytes of shared memory per block: half of the channels of tiles and of q, mail, masks, barriers."""
    tile, mailbox = 64 * spec.d_qk, 2048 + 1024 + 128
    tiles = config["num_stages"] * (tile + 8 + 2 * _BARRIER)
    return tiles + 2 * tile + 2 * _BARRIER + 8 * (mailbox + 2 * _BARRIER)


def derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    return {"half": D_V // 2, "half_tail": (spec.d_qk - D_V) // 2}
