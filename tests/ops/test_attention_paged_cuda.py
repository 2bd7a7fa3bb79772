"""Sparse decode by clusters, in CUDA C++: what it compiles to, what it is told, what its gatherers leave for the products."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec, clusters
from dsa_codegen.problem.caches import tokens_of, valid_slots
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.verify import verify

import emulator
from paged_designs import CLUSTERS
from support import FURTHER, H200, assert_compiles

SPILLS_BETWEEN_QUERIES = 128  # bytes; none is touched in the loops over tiles
TWO_POOLS = AttentionPagedSpec(40, 70, "v4", lengths=True, sink=True, extra_topk=300, extra_page=2, extra_lengths=True)


@pytest.mark.parametrize(
    "spec",
    [
        TWO_POOLS,
        pytest.param(AttentionPagedSpec(128, 2048), marks=FURTHER),
        pytest.param(AttentionPagedSpec(64, 2048), marks=FURTHER),
        pytest.param(AttentionPagedSpec(100, 640, "v4", lengths=True), marks=FURTHER),
    ],
    ids=lambda spec: spec.id,
)
def test_clusters_compile_for_hopper(spec):
    assert_compiles(OP, spec, CLUSTERS, spills=SPILLS_BETWEEN_QUERIES)
    built = build.find(render(OP, spec, CLUSTERS), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


def parameters(text, kernel):
    """The names of a kernel's parameters in order."""
    return [each.split()[-1] for each in re.search(rf"\n{kernel}\((.*?)\) {{", text, re.DOTALL)[1].split(",")]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    "spec",
    [
        AttentionPagedSpec(128, 300, sink=True),
        TWO_POOLS,
        pytest.param(AttentionPagedSpec(100, 300, page=7, lengths=True), marks=FURTHER),
        pytest.param(AttentionPagedSpec(64, 200, "v4", 53, lengths=True, sink=True), marks=FURTHER),
        pytest.param(AttentionPagedSpec(100, 150, "v41", d_rope=0, lengths=True), marks=FURTHER),
    ],
    ids=lambda spec: spec.id,
)
def test_rows_whole_and_in_parts_match_the_reference(spec, tmp_path):
    """By two clusters: rows in turn, in three parts each, and as the launch shares them out."""
    kernels, gpu, seen = emulator.cuda_kernels(render(OP, spec, CLUSTERS), tmp_path, "shuffled"), replace(H200, sms=4), set()
    for splits, rows, distribution in ((1, 3, "ragged"), (3, 2, "ragged"), (0, 3, "random"), (0, 1, "random")):
        variant = Variant(OP, spec, CLUSTERS.replace(splits=splits), gpu, kernels)
        accuracy = verify(variant, Case(AttentionPagedSizes(rows, 1, 333), distribution), "cpu", repeats=1)
        assert accuracy.passed, (splits, rows, accuracy.detail)
        inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 333), "random"), Draw(0, "meta"))
        launches = OP.launches(spec, variant.config, inputs, OP.allocate(spec, inputs), gpu)
        seen.add(tuple(launch.kernel for launch in launches))
    assert seen == {("attention_paged",), ("attention_paged", "combine")}


def even(spec, rows, gpu):
    """What is no wave of whole rows in equal shares, whatever that takes."""
    room, tiles = gpu.sms // 2, -(-spec.topk // 64) + -(-spec.extra_topk // 64)
    rest = rows % room
    share = -(-rest * tiles // room)
    busy = -(-rest * tiles // share) if rest < rows else room
    return clusters.Dealt(room if rest < rows else busy, rows - rest, (tiles - 1) // share + 2, share)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    "spec",
    [AttentionPagedSpec(128, 300), TWO_POOLS, pytest.param(AttentionPagedSpec(64, 400, "v4", 53, lengths=True), marks=FURTHER)],
    ids=lambda spec: spec.id,
)
def test_equal_shares_of_rows_match_the_reference(spec, tmp_path, monkeypatch):
    """By three clusters: of one row, of two, of which a cluster has both, and behind whole rows."""
    monkeypatch.setattr(clusters, "dealt", even)
    variant = Variant(
        OP, spec, CLUSTERS, replace(H200, sms=6), emulator.cuda_kernels(render(OP, spec, CLUSTERS), tmp_path, "shuffled")
    )
    for rows, distribution in ((1, "random"), (2, "ragged"), (4, "random"), (5, "ragged")):
        accuracy = verify(variant, Case(AttentionPagedSizes(rows, 1, 500), distribution), "cpu", repeats=1)
        assert accuracy.passed, (rows, accuracy.detail)


@pytest.mark.parametrize("rows", [1, 8, 12, 24, 40, 48, 64, 66, 67, 80, 112, 128, 133, 148, 200, 300, 4096])
@pytest.mark.parametrize(
    "spec", [AttentionPagedSpec(128, 2048), AttentionPagedSpec(64, 2048), AttentionPagedSpec(128, 640, "v4")]
)
def test_every_tile_is_some_clusters(spec, rows):
    tiles, given = -(-spec.topk // 64), clusters.dealt(spec, rows, H200)
    rest = rows - given.whole
    assert given.clusters <= 66 and (given.whole % 66 == 0 or given.splits == 1)
    if given.share:
        assert 0 < rest < 66 and given.share < tiles
        assert (given.clusters - 1) * given.share < rest * tiles <= 66 * given.share or given.whole
        of_a_row = [1 + (row * tiles + tiles - 1) // given.share - row * tiles // given.share for row in range(rest)]
        assert max(of_a_row) <= given.splits
    else:
        assert given.clusters == min(66, given.whole + rest * given.splits)


@pytest.mark.parametrize(
    ("spec", "batch", "next_n", "served"),
    [
        (AttentionPagedSpec(128, 2048), 8, 1, False),  # rounds
        (AttentionPagedSpec(128, 2048), 9, 1, True),
        (AttentionPagedSpec(128, 2048), 5, 2, True),
        (AttentionPagedSpec(128, 2048), 200, 2, True),
        (AttentionPagedSpec(128, 1024), 9, 1, False),
        (AttentionPagedSpec(64, 640, "v4"), 64, 1, True),
        (AttentionPagedSpec(64, 640, "v4"), 57, 2, False),
        (AttentionPagedSpec(64, 2048), 64, 1, False),  # pairs
    ],
)
def test_they_serve_what_they_are_known_to_serve_faster(spec, batch, next_n, served):
    assert (OP.default_config(spec, AttentionPagedSizes(batch, next_n, 1 << 20), H200) == CLUSTERS) is served


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("spec", [AttentionPagedSpec(128, 70, sink=True), AttentionPagedSpec(5, 70, lengths=True), TWO_POOLS])
def test_kernels_get_their_arguments(spec, splits):
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(2, 3, 90), "ragged"), Draw(0))
    outputs = OP.allocate(spec, inputs)
    main, *joining = OP.launches(spec, CLUSTERS.replace(splits=splits), inputs, outputs, H200)
    namespace: dict = {}
    exec(render(OP, spec, CLUSTERS).code, namespace)
    values = {**inputs, **outputs, "splits": splits, "whole": 0, "rows": 6, "next_n": 3, "topk": 70, "page": 64}
    for launch in (main, *joining):
        facts, names = namespace["KERNELS"][launch.kernel], parameters(namespace["SOURCE"], launch.kernel)
        assert len(names) == len(facts["args"]) == len(launch.args)
        for name, kind, value in zip(names, facts["args"], launch.args, strict=True):
            assert isinstance(value, torch.Tensor) == (kind == "ptr"), name
            assert name not in values or value is values[name] or value == values[name], name
    assert len(joining) == (splits > 1)
    assert main.grid == (2 * 6 * splits, 1, 1)


@pytest.mark.parametrize(
    ("rows", "heads", "running", "joined"),
    [
        (1, 128, 16, 128),  # no longest part is shorter than two tiles
        (1, 64, 12, 64),  # of 64 heads, than three
        (8, 128, 64, 8 * 128),
        (64, 128, 64, 0),  # about a wave
        (128, 64, 66, 0),
        (4096, 128, 66, 4 * 128),
    ],
)
def test_clusters_share_rows(rows, heads, running, joined):
    spec = AttentionPagedSpec(heads, 2048)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 4096), "random"), Draw(0, "meta"))
    main, *joining = OP.launches(spec, CLUSTERS, inputs, OP.allocate(spec, inputs), H200)
    assert main.grid[0] == 2 * running
    assert sum(launch.grid[0] for launch in joining) == joined


# In place of the products: what lies in shared memory is kept, tile after tile, and overwritten before its place is given back.
KEEPERS = """
    u32 stage = 0, phase = 0, q_phase = 0;
    for (int query = first_query; query < queries; query += clusters) {
      for (int tile = 0; tile < tiles_of(query); tile++) {
        const bool mine = !TOGETHER || warp / 4 == tile % 2;
        barrier_wait(base + FULL + 8 * stage, phase);
        if (tile == 0) {
          barrier_wait(base + Q_FULL, q_phase);
          q_phase ^= 1;
          if (thread == 0) memcpy((char*)out + query * Q_TILES * TILE, emulator::shared + AT_Q, Q_TILES * TILE);
        }
        if (thread == (TOGETHER ? tile % 2 * 128 : 0)) {
          char* to = (char*)parts + (query * MOST + tile) * (TILE + 4);
          memcpy(to, emulator::shared + stage * TILE, TILE);
          memcpy(to + TILE, emulator::shared + AT_MASK + 8 * stage, 4);
          memset(emulator::shared + stage * TILE, 0xCD, TILE);
        }
        if (mine && lane == 0) barrier_arrive(base + EMPTY + 8 * stage);
        if (tile == tiles_of(query) - 1 && lane == 0) barrier_arrive(base + Q_EMPTY);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
"""
MOST = 12  # tiles of a query below


def unswizzled(piece, width):
    """bf16 rows [64, width / 2] of a piece as products read it: 16 bytes of a row lie where its number says."""
    rows, columns = torch.arange(64)[:, None], torch.arange(width // 16)
    places = columns ^ (rows & 7 if width == 128 else rows // 2 & 3)
    return piece.view(64, width // 16, 16)[rows, places].reshape(64, width).view(torch.bfloat16)


def rows_of(tile, tail):
    """bf16 [64, 256 + tail] of a tile's bytes."""
    pieces = [unswizzled(piece, 128) for piece in tile[: 4 * 8192].split(8192)]
    return torch.cat([*pieces, *([unswizzled(tile[4 * 8192 :], 64)] if tail else [])], 1)


def channels(latents, rank):
    """A block's half of the channels."""
    tail = (latents.shape[1] - 512) // 2
    return torch.cat([latents[:, 256 * rank :][:, :256], latents[:, 512 + tail * rank :][:, :tail]], 1)


def listed(spec, inputs, row):
    """bf16 latents and validity of a query's entries, each pool padded to whole tiles."""
    latents, valid = [], []
    for prefix, layout in (("", spec.layout), *((("extra_", spec.extra_layout),) if spec.extra_topk else ())):
        cache, indices, lengths = (inputs[f"{prefix}{name}"] for name in ("cache", "indices", "lengths"))
        slots = indices.flatten(0, 1)[row]
        if lengths is not None:
            slots = slots[: max(0, int(lengths.flatten()[row] if lengths.dim() == 2 else lengths[row // indices.shape[1]]))]
        slots = torch.nn.functional.pad(slots, (0, -len(slots) % 64), value=-1)
        real = valid_slots(slots, tokens_of(layout, cache))
        found = torch.zeros(len(slots), inputs["q"].shape[3], dtype=torch.bfloat16)
        if real.any():
            found[real] = layout.dequantize(cache, slots[real]).bfloat16()
        latents.append(found)
        valid.append(real)
    return torch.cat(latents), torch.cat(valid)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "splits", "rank"),
    [
        (TWO_POOLS, 3, 1),
        pytest.param(AttentionPagedSpec(100, 150, page=7, lengths=True), 1, 0, marks=FURTHER),
        pytest.param(AttentionPagedSpec(128, 200), 3, 1, marks=FURTHER),
        pytest.param(AttentionPagedSpec(64, 300, "v4", 53), 1, 1, marks=FURTHER),
        (AttentionPagedSpec(64, 150, "v41", 53, d_rope=0), 1, 1),
        pytest.param(AttentionPagedSpec(100, 150, "v41", d_rope=0, lengths=True), 3, 0, marks=FURTHER),
        pytest.param(AttentionPagedSpec(100, 150, "fp8_fp32_128", 7, d_rope=0), 1, 1, marks=FURTHER),
        pytest.param(AttentionPagedSpec(40, 150, "fp8_ue8m0_32", d_rope=0), 1, 1, marks=FURTHER),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else str(value),
)
def test_gatherers_place_what_the_products_read(spec, splits, rank, tmp_path):
    """Every tile of every part of every row, as the lists, lengths and caches say; block 1 has a tile's halves swapped."""
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(2, 2, 300), "ragged"), Draw(3))
    variant = replace(H200, sms=6)
    main, *_ = OP.launches(spec, CLUSTERS.replace(splits=splits), inputs, OP.allocate(spec, inputs), variant)
    together, q_tiles, d_qk = spec.heads <= 64, -(-spec.heads // 64), inputs["q"].shape[3]
    tile, tail = 64 * d_qk, (d_qk - 512) // 2
    tiles, queries = (
        torch.zeros(4 * splits, MOST, tile + 4, dtype=torch.uint8),
        torch.zeros(4 * splits, q_tiles, tile, dtype=torch.uint8),
    )
    constants = {"TOGETHER": int(together), "Q_TILES": q_tiles, "MOST": MOST}
    kernel = emulator.cuda_gatherers(render(OP, spec, CLUSTERS), tmp_path, "attention_paged", KEEPERS, rank, constants)
    kernel(main.grid, {"out": queries, "parts": tiles}, main.args)
    for query in range(4 * splits):
        row, split = divmod(query, splits)
        latents, valid = listed(spec, inputs, row)
        count = len(valid) // 64
        first, last = split * count // splits, (split + 1) * count // splits
        least = max(-(-(last - first) // 2), 2) * 2 if together else max(last - first, 2)
        for number in range(least):
            within = first + number < last
            order = (first + number) * 64 + (torch.arange(64) ^ 32 * rank)
            expected = channels(latents[order], rank) if within else torch.zeros(64, 256 + tail, dtype=torch.bfloat16)
            assert torch.equal(rows_of(tiles[query, number, :tile], tail), expected), (query, number)
            mask = tiles[query, number, tile:].view(torch.int32).item()
            assert [mask >> bit & 1 for bit in range(32)] == (valid[order[:32]].int().tolist() if within else [0] * 32)
        of_row = torch.nn.functional.pad(inputs["q"].flatten(0, 1)[row], (0, 0, 0, -spec.heads % 64))
        for part in range(q_tiles):
            assert torch.equal(rows_of(queries[query, part], tail), channels(of_row[64 * part :][:64], rank))
