"""Launches of blocks that stay (CUDA C++): lists as they came, sorted or joined; the last ones cut, and their sums added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...gpu import Gpu
from ...problem.channels import D_V
from ...problem.checks import step
from ...problem.op import Config, Inputs, Launch, Outputs
from .. import pair
from . import sweep
from .problem import AttentionSpec, sharing

_PAIR_TILES = 2 * 64  # tokens of two tiles: less of a list is no block's part
_LEAST_SAVED = 4  # pairs of tiles, some 15 µs, for which a list is cut: the sums' way takes half of that
_BANDS = 32  # of the cache, by which lists are sorted
_MOST = (1 << 32) - 1
_SORTED_FROM = 256  # queries: fewer are two or three rounds of blocks, of which few share what one brings to the L2


@dataclass(frozen=True)
class _Lists:
    """What blocks that attend read in place of the lists that were given."""

    entries: Tensor
    stride: int
    lengths: Tensor | None
    made_by: tuple[Launch, ...] = ()
    counters: tuple[Tensor | int, ...] = ()
    """Of steps that blocks take together, and how many they are."""


def _lists(spec: AttentionSpec, config: Config, inputs: Inputs, gpu: Gpu, round_: int, steps: int | None = None) -> _Lists:
    """The lists as they came, or sorted.

    ``round_``: queries that the blocks have at a time. ``steps``: that they take together, None where they have no counters.
    """
    lists, lengths = inputs["indices"], inputs["lengths"]
    if not config["sweep"] or len(lists) < _SORTED_FROM:
        counters = (lists, 0) if config["sweep"] and steps is not None and lengths is None else ()  # none is looked at
        return _Lists(lists, step(lists, 0), lengths, counters=counters)
    entries = lists.new_empty(len(lists), lists.shape[-1])
    given = (lists, entries) if lengths is None else (lists, lengths, entries)
    # Lists of several lengths are not gone through together: a round would take as long as the longest.
    counters = () if steps is None or lengths is not None else (lists.new_empty(max(steps, 1)), steps)
    tokens, topk = len(inputs["kv"]), lists.shape[-1]
    args = (*given, *counters, len(lists), tokens, topk, round_, min((_BANDS << 32) // tokens, _MOST), step(lists, 0))
    sort = Launch("sort", (sweep.sorting_blocks(spec, len(lists), gpu), 1, 1), args)
    return _Lists(entries, topk, lengths, (sort,), counters)


def _joined(spec: AttentionSpec, inputs: Inputs, share: int) -> _Lists:
    """The lists of ``share`` neighbouring queries as one."""
    lists, lengths = inputs["indices"], inputs["lengths"]
    bundles, most = -(-len(lists) // share), share * spec.topk
    unions, counts = (lists.new_empty(shape) for shape in ((bundles, most), (bundles,)))
    given = (lists,) if lengths is None else (lists, lengths)
    args = (*given, unions, counts, len(lists), len(inputs["kv"]), spec.topk, step(lists, 0))
    return _Lists(unions, most, counts, (Launch("unite", (bundles, 1, 1), args),))


def _few(spec: AttentionSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Blocks that stay, each with two bundles of queries at a time; before them, the lists of each bundle are joined."""
    q, kv = inputs["q"], inputs["kv"]
    share, sizes = sharing(spec.heads, spec.share), (len(q), len(kv))
    bundles = -(-len(q) // share)
    blocks = min(bundles, gpu.sms)
    lists = _joined(spec, inputs, share) if share > 1 else _lists(spec, config, inputs, gpu, 2 * blocks)
    optional = [tensor for tensor in (lists.lengths, inputs["sink"]) if tensor is not None]
    strides = (step(q, 0), step(q, 1), step(kv, 0), lists.stride)
    tensors = (q, kv, lists.entries, *optional, *outputs.values())
    args = (*tensors, *sizes, share * spec.topk, *strides, *lists.counters, inputs["sm_scale"])
    return (*lists.made_by, Launch("attention", (blocks, 1, 1), args))


def _pairs(spec: AttentionSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Blocks that stay, each with 64 heads of a query after another; the last lists may be cut, and a second kernel adds up."""
    q, kv = inputs["q"], inputs["kv"]
    parts, pairs = spec.heads // pair.HEADS, -(-spec.topk // _PAIR_TILES)
    items = len(q) * parts
    whole, cut = cut_last(items, pairs, gpu.sms) if divides(spec) else (items, 1)
    units = (items - whole) * cut
    blocks = min(whole + units, gpu.sms)
    lists = _lists(spec, config, inputs, gpu, max(blocks // parts, 1), whole // blocks * pairs)
    sink = () if inputs["sink"] is None else (inputs["sink"],)
    lengths = () if lists.lengths is None else (lists.lengths,)
    sums, facts = (outputs["lse"].new_empty(units, pair.HEADS, width) for width in (D_V, 4))
    divided = (sums, facts, whole, cut) if divides(spec) else ()
    strides = (step(q, 0), step(q, 1), step(kv, 0), lists.stride)
    tensors = (q, kv, lists.entries, *lengths, *sink, *outputs.values())
    args = (*tensors, *divided, len(q), len(kv), spec.topk, *strides, *lists.counters, inputs["sm_scale"])
    attend = (*lists.made_by, Launch("attention", (blocks, 1, 1), args))
    if not units:
        return attend
    combine = (sums, facts, *sink, *outputs.values(), whole, cut, inputs["sm_scale"])
    return (*attend, Launch("combine", ((items - whole) * pair.HEADS, 1, 1), combine, touched=sums.nbytes))


LAUNCHES: Mapping[str, Callable[[AttentionSpec, Config, Inputs, Outputs, Gpu], Sequence[Launch]]] = {
    "few": _few,
    "pair": _pairs,
}
"""By the name of the design."""


def cut_last(items: int, pairs: int, blocks: int) -> tuple[int, int]:
    """How many items blocks take whole, in full rounds, and into how many parts each one behind is cut.

    ``pairs``: of tiles, which a whole item has.
    """
    rest = items % blocks
    cut = min(blocks // rest, pairs) if rest else 1
    return (items - rest, cut) if pairs + (-pairs // cut) >= _LEAST_SAVED else (items, 1)


def divides(spec: AttentionSpec) -> bool:
    """Whether lists may be cut at all: where bits may depend on what is beside a row, and parts would be long enough."""
    return not spec.batch_invariant and -(-spec.topk // _PAIR_TILES) > _LEAST_SAVED
