"""Lists that are sorted first, so that all blocks go through the cache together: when, how long, what a template is told."""

from __future__ import annotations

from collections.abc import Iterable

from ...gpu import Gpu
from ...problem.channels import usual
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar
from .problem import AttentionSizes, AttentionSpec, sharing

SORTERS = 256
"""Threads of a block that sorts, 32 of them a list."""
_SORTED_EACH = {16: 3, 32: 2, 64: 2, 128: 1}  # entries that each of them has, in registers, and blocks on an SM
MOST_BLOCKS = max(_SORTED_EACH.values())
"""On an SM, of those that sort."""
_MOST_ENTRIES = 32 * max(_SORTED_EACH)
_LANE_BYTES = 4 * 32  # places of its entries of each band
_PATIENCE = 128  # looks at a counter of steps: some 60 us
_LAG = 4  # steps, of a pair of tiles, that a block may be ahead
# H200, 4096 queries, without and with: 64 heads of 32K 1989 and 1932 µs, of 64K 2266 and 2008, of 128K 2453 and 2219; 128
# heads 3908 and 3821, 4102 and 3960, 4198 and 4168; 16 heads of 32K 1174 and 1177, of 64K 1481 and 1167, of 128K 1772 and 1251;
# 8 heads of 32K 1089 and 1046. 128 heads of 16K lose (3689 and 3761).
# k 1024: 16 heads of 32K 633 and 612, of 64K 773 and 648, of 128K 919 and 723, 512 queries of them 124 and 99; 64 heads of 64K
# 1135 and 1051, of 128K 1168 and 1129, 512 queries of them 153 and 155; 128 heads gain nothing. k 512: 16 heads of 64K 366 and
# 345; 64 heads gain nothing.
_LEAST_TOPK = {32: (1024, 512), 64: (2048, 1024), 128: (2048, 2048)}
"""Entries of a list, by the heads that are no more; of many queries where the L2 misses most."""


def pays(spec: AttentionSpec, sizes: AttentionSizes) -> bool:
    """Whether lists are sorted by default, which takes an order that nothing else decides."""
    least, least_far = next(least for heads, least in _LEAST_TOPK.items() if spec.heads <= heads)
    if spec.batch_invariant or not least_far <= spec.topk <= _MOST_ENTRIES:
        return False
    near, far, _ = sizes.EDGES["tokens"]
    many = sizes.queries >= sizes.EDGES["queries"][0]
    if spec.topk < least and not many:
        return False
    takes = usual(spec.d_qk, spec.d_v) and sharing(spec.heads, spec.share) == 1
    return takes and sizes.tokens >= (near if many and spec.topk >= least else far)


def constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    """What cannot be sorted."""
    if config["sweep"]:
        yield from exceeds("entries of a sorted list", spec.topk, _MOST_ENTRIES)


def derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    each = _sorted_each(spec)
    return {
        "sweep": config["sweep"],
        "marking": False,  # which parts of a cache are in lists
        "sorters": SORTERS,
        "sorted_each": each,
        "sorting_blocks": _SORTED_EACH[each],
        "sorting_smem": SORTERS * (_LANE_BYTES + 4 * each),
        "patience": _PATIENCE,
        "lag": _LAG,
    }


def sorting_blocks(spec: AttentionSpec, queries: int, gpu: Gpu) -> int:
    """Of the grid that sorts: as many as an SM holds, which take one list after another."""
    return min(-(-32 * queries // SORTERS), _SORTED_EACH[_sorted_each(spec)] * gpu.sms)


def _sorted_each(spec: AttentionSpec) -> int:
    return next((each for each in _SORTED_EACH if spec.topk <= 32 * each), max(_SORTED_EACH))
