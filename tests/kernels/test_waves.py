"""Sharing blocks out over a GPU: every tile once, and no place idle for long at the end."""

from __future__ import annotations

import heapq

import pytest

from dsa_codegen.kernels.waves import _played, share_out, until_done

SLOTS = 396  # three blocks on each SM of an H200


def tiles_of(blocks, longest, shortest):
    return [longest - (longest - shortest) * block // blocks for block in range(blocks)]


def programs(tiles, whole, splits):
    """(block, first tile, tiles) of each program, as the kernels number them."""
    shares = []
    for program in range(whole + (len(tiles) - whole) * splits):
        rest, parts = max(program - whole, 0), 1 if program < whole else splits
        block, split = min(program, whole) + rest // parts, rest % parts
        each, more = divmod(tiles[block], parts)
        shares.append((block, each * split + min(more, split), each + (split < more)))
    return shares


def busy_share(tiles, whole, splits, slots, start=1.0):
    """The part of the time that the GPU computes tiles, where each program goes to the place that is free first."""
    places = [0.0] * slots
    for *_, count in programs(tiles, whole, splits):
        heapq.heapreplace(places, places[0] + count + start)
    return sum(tiles) / slots / max(places)


@pytest.mark.parametrize("longest", [1, 3, 130])
@pytest.mark.parametrize("slots", [1, 66, 99])
@pytest.mark.parametrize("blocks", [1, 32, 99, 256, 257])
def test_every_tile_is_covered_once(blocks, slots, longest):
    tiles = tiles_of(blocks, longest, longest // 2)
    whole, splits = share_out(blocks, slots, longest, longest // 2)
    assert 0 <= whole <= blocks
    assert 1 <= splits <= longest
    covered = [(block, low + n) for block, low, count in programs(tiles, whole, splits) for n in range(count)]
    assert covered == [(block, tile) for block in range(blocks) for tile in range(tiles[block])]


@pytest.mark.parametrize(
    ("blocks", "longest", "shortest", "least"),
    [
        (1024, 512, 448, 0.98),  # 4096 queries of 64 heads, context 32768
        (1024, 2048, 1984, 0.96),
        (128, 16384, 16368, 0.96),  # 1024 queries at a million tokens
        (1024, 543, 479, 0.96),  # rounded down by as much as it can be
        (512, 512, 448, 0.96),
        (128, 128, 120, 0.91),
        (16, 512, 512, 0.89),
        (1024, 64, 0, 0.93),  # all of a context: a triangle
        (2048, 128, 0, 0.94),
        (512, 64, 0, 0.88),
        (1250, 78, 0, 0.94),
    ],
)
def test_all_places_finish_together(blocks, longest, shortest, least):
    tiles = tiles_of(blocks, longest, shortest)
    assert busy_share(tiles, *share_out(blocks, SLOTS, longest, shortest), SLOTS) > least


@pytest.mark.parametrize(("longest", "shortest"), [(512, 512), (128, 96), (64, 0)])
@pytest.mark.parametrize("blocks", [100, 397, 512, 1024, 3000])
def test_is_no_slower_than_whole_blocks(blocks, longest, shortest):
    tiles = tiles_of(blocks, longest, shortest)
    assert busy_share(tiles, *share_out(blocks, SLOTS, longest, shortest), SLOTS) >= busy_share(tiles, blocks, 1, SLOTS) * 0.99


def test_full_waves_are_not_split():
    assert share_out(792, SLOTS, 512, 512)[1] == 1


def test_a_growing_context_is_rarely_a_new_one():
    """Chunks of 512 queries, from 64K tokens on."""
    _played.cache_clear()
    for chunk in range(64):
        tiles = (65536 + 512 * (chunk + 1)) // 64
        share_out(128, SLOTS, tiles, tiles - 8)
    assert _played.cache_info().misses <= 16


@pytest.mark.parametrize(
    ("blocks", "whole", "splits", "tiles"),
    [
        (132, 0, 1, 2 + 32),
        (133, 0, 1, 2 * (2 + 32)),  # a second wave for one block
        (133, 132, 32, 2 + 32 + 2 + 1),  # which 32 programs share
        (16, 0, 12, 2 * (2 + 3)),  # 192 programs of 3 tiles at most
    ],
)
def test_programs_run_in_waves(blocks, whole, splits, tiles):
    assert until_done(blocks, 132, 32, whole, splits, start=2) == tiles
