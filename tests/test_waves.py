"""Sharing blocks out among waves: every tile once, whole waves first, little idle time in the last one."""

from __future__ import annotations

import math

import pytest

from dsa_codegen.waves import share_out


@pytest.mark.parametrize("tiles", [1, 3, 130])
@pytest.mark.parametrize("slots", [1, 66, 99])
@pytest.mark.parametrize("blocks", [1, 32, 99, 256, 257])
def test_every_tile_is_covered_once(blocks, slots, tiles):
    whole, splits = share_out(blocks, slots, tiles)
    assert whole % slots == 0 or splits == 1
    assert 1 <= splits <= tiles
    covered = []
    for program in range(whole + (blocks - whole) * splits):
        # As the kernels number their programs.
        rest, parts = max(program - whole, 0), 1 if program < whole else splits
        block, share = min(program, whole) + rest // parts, -(-tiles // parts)
        low = rest % parts * share
        covered += [(block, tile) for tile in range(low, min(low + share, tiles))]
    assert covered == [(block, tile) for block in range(blocks) for tile in range(tiles)]


@pytest.mark.parametrize("blocks", [16, 75, 128, 256, 512, 1024])
def test_the_last_wave_is_full(blocks):
    slots, tiles = 396, 512
    whole, splits = share_out(blocks, slots, tiles)
    busy = blocks * tiles
    waves = math.ceil((blocks - whole) * splits / slots) * math.ceil(tiles / splits) + whole // slots * tiles
    assert busy / (waves * slots) > 0.93


def test_full_waves_are_not_split():
    assert share_out(792, 396, 512) == (792, 1)
    assert share_out(1024, 396, 512)[0] == 792
