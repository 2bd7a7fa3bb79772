"""What launches of the paged indexer on Hopper share: the cache as TMA sees it, and how programs are shared out among rows."""

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


def tiled(spec: IndexerPagedSpec, cache: Tensor) -> tuple[Tiled, Tiled]:
    """The cache's keys e4m3 [blocks, page, head_dim] and scales fp32 [blocks, page], for TMA."""
    blocks, stride = cache.shape[0], cache.stride(0)
    keys = Tiled(cache, (blocks, spec.page, spec.head_dim), (stride, spec.head_dim, 1))
    return keys, Tiled(cache, (blocks, spec.page), (stride // 4, 1), spec.layout.scale.base)
