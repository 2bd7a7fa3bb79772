"""Launches of the paged indexer on Hopper: how programs are shared out among rows, and the cache as TMA sees it."""

from __future__ import annotations

from torch import Tensor

from ...kernels.tma import Tiled
from .problem import IndexerPagedSpec

TILE = 64
"""Tokens of a tile, the M operand of a product."""


def row_groups(batch: int, tiles: int, programs: int) -> tuple[int, int]:
    """(groups, programs in each): a group for every row, unless that leaves more than a tenth of the resident programs out."""
    width = min(max(programs // batch, 1), tiles)
    if width == tiles or 0 <= programs - batch * width <= programs // 10:
        return batch, width
    return programs // width, width


def whole_rows(batch: int, tiles: int, sms: int) -> tuple[int, int]:
    """The same for one program an SM: whole rows, or even parts of them, where that leaves no more than a tenth of the SMs out.

    Otherwise there are fewer groups than rows: a program begins with its group's row, and meanwhile the queries are brought of
    what is dealt out behind that.
    """
    rounds = -(-batch // sms)
    even = -(-batch // rounds)  # programs or groups that take as many rows each
    width = min(sms // even, tiles)
    if width == tiles or sms - even * width <= sms // 10:
        return even, width
    width = min(-(-sms // batch), tiles)
    return sms // width, width


def tiled(spec: IndexerPagedSpec, cache: Tensor) -> tuple[Tiled, Tiled]:
    """The cache's keys e4m3 [blocks, page, head_dim] and scales fp32 [blocks, page], for TMA."""
    blocks, stride = cache.shape[0], cache.stride(0)
    keys = Tiled(cache, (blocks, spec.page, spec.head_dim), (stride, spec.head_dim, 1))
    return keys, Tiled(cache, (blocks, spec.page), (stride // 4, 1), spec.layout.scale.base)


def keys_and_scales(spec: IndexerPagedSpec, cache: Tensor) -> Tiled:
    """The cache as rows of as many bytes as a key has, for TMA: of each block keys, then scales."""
    blocks, stride = cache.shape[0], cache.stride(0)
    return Tiled(cache, (blocks, cache.shape[1] * cache.shape[3] // spec.head_dim, spec.head_dim), (stride, spec.head_dim, 1))
