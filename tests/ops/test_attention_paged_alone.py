"""Sparse decode of many rows: as many blocks as SMs take rows of 64 heads whole, and even shares of what is left."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec, alone
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.verify import verify

import emulator
from paged_designs import CLUSTERS
from support import FURTHER, H200, assert_compiles

ALONE = CLUSTERS.replace(sharers=1)
TWO_POOLS = AttentionPagedSpec(40, 70, "v4", lengths=True, sink=True, extra_topk=300, extra_page=2, extra_lengths=True)
SPECS = [
    AttentionPagedSpec(40, 300, page=7, lengths=True, sink=True),
    AttentionPagedSpec(64, 400),
    pytest.param(TWO_POOLS, marks=FURTHER),
    pytest.param(AttentionPagedSpec(100, 300, "v41", d_rope=0, lengths=True, sink=True), marks=FURTHER),
    pytest.param(AttentionPagedSpec(5, 300, "fp8_fp32_128", 7, d_rope=0, extra_topk=90, extra_page=2), marks=FURTHER),
]


def dealt(spec, units, listed, gpu=H200):
    """(units that some block has alone, by block; tiles of every unit that are in shares, with the block that has each)."""
    blocks, whole, share = alone.dealt(spec, units, listed, gpu)
    own = [list(range(block, whole, blocks)) for block in range(blocks)]
    shared = [tile // share for tile in range((units - whole) * listed)] if share else []
    return blocks, whole, share, own, shared


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_rows_whole_and_shared_match_the_reference(spec, tmp_path):
    """On few SMs: one row of several blocks, rows that all are shared, some whole and others shared, all whole."""
    kernels = emulator.cuda_kernels(render(OP, spec, ALONE), tmp_path, "shuffled")
    seen = set()
    head_blocks = -(-spec.heads // 64)
    for gpu in (replace(H200, sms=3 * head_blocks), replace(H200, sms=2 * head_blocks)):
        variant = Variant(OP, spec, ALONE, gpu, kernels)
        for rows, distribution in ((1, "ragged"), (2, "random"), (3, "random"), (5, "ragged"), (7, "random")):
            accuracy = verify(variant, Case(AttentionPagedSizes(rows, 1, 333), distribution), "cpu", repeats=1)
            assert accuracy.passed, (gpu.sms, rows, accuracy.detail)
            _, whole, share = alone.dealt(spec, rows * head_blocks, -(-(spec.topk + spec.extra_topk) // 64), gpu)
            seen.add((whole > 0, share > 0))
    assert seen == {(True, False), (False, True), (True, True)}


@pytest.mark.parametrize(
    "spec",
    [AttentionPagedSpec(64, 2048, sink=True), pytest.param(replace(TWO_POOLS, heads=64), marks=FURTHER)],
    ids=lambda spec: spec.id,
)
def test_it_compiles_for_hopper(spec):
    assert_compiles(OP, spec, ALONE, spills=128)  # of what an errand needs, between errands
    built = build.find(render(OP, spec, ALONE), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize("units", [1, 8, 16, 64, 66, 67, 80, 112, 128, 131, 132, 133, 148, 200, 263, 264, 265, 600, 4096])
@pytest.mark.parametrize("listed", [1, 2, 3, 10, 32, 256])
def test_every_tile_is_somebodys_and_no_block_leaves_more_than_two_parts(units, listed):
    spec = AttentionPagedSpec(64, 64 * listed)
    blocks, whole, share, own, shared = dealt(spec, units, listed)
    assert blocks <= H200.sms and sorted(unit for each in own for unit in each) == list(range(whole))
    assert share < listed and (share > 0) == (whole < units)
    if share:
        assert max(shared) < blocks
        parts = {(block, tile // listed) for tile, block in enumerate(shared)}
        assert max(sum(of == block for of, _ in parts) for block in range(blocks)) <= 2
    tiles = [len(own[block]) * listed + shared.count(block) for block in range(blocks)]
    assert max(tiles) <= math.ceil(units / H200.sms) * listed, "nobody has more than where every unit is one block's"


def test_what_fills_waves_of_blocks_is_not_shared():
    spec = AttentionPagedSpec(64, 2048)
    for units in (128, 132, 264):
        assert alone.dealt(spec, units, 32, H200) == (min(units, H200.sms), units, 0)
    for units, most in ((80, 20), (200, 49), (148, 36), (600, 146)):
        _, whole, share = alone.dealt(spec, units, 32, H200)
        assert whole // H200.sms * 32 + share <= most


def test_rows_of_a_batch_invariant_call_are_whole():
    """Their bits may not depend on how many rows there are."""
    spec = AttentionPagedSpec(64, 2048, batch_invariant=True)
    assert alone.dealt(spec, 80, 32, H200) == (80, 80, 0)
    assert OP.order(spec, ALONE) == "cuda-alone" and OP.order(replace(spec, batch_invariant=False), ALONE) is None


@pytest.mark.parametrize(("heads", "rows", "kernels"), [(64, 5, 2), (65, 5, 2), (64, 132, 1), (64, 150, 2)])
def test_a_launch_has_what_its_kernels_take(heads, rows, kernels):
    spec = AttentionPagedSpec(heads, 700, sink=True, lengths=True)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 90), "ragged"), Draw(0))
    launches = OP.launches(spec, ALONE, inputs, OP.allocate(spec, inputs), H200)
    namespace: dict = {}
    exec(render(OP, spec, ALONE).code, namespace)
    assert len(launches) == kernels
    for launch in launches:
        kinds = namespace["KERNELS"][launch.kernel]["args"]
        assert [isinstance(value, torch.Tensor) for value in launch.args] == [kind == "ptr" for kind in kinds]


def test_splits_are_no_choice():
    found = OP.violations(AttentionPagedSpec(64, 2048), ALONE.replace(splits=2), H200)
    assert [violation.name for violation in found] == ["splits beside sharers"]


@pytest.mark.parametrize(
    ("spec", "served", "not_served"),
    [
        (
            AttentionPagedSpec(64, 2048),
            ((9, 1), (33, 1), (48, 2), (56, 1), (57, 2), (67, 1), (132, 1), (300, 1), (148, 2)),
            ((8, 1), (64, 1)),
        ),
        (AttentionPagedSpec(33, 16384), ((8, 1), (148, 2)), ((1, 1), (4, 1))),
        (
            AttentionPagedSpec(64, 640, "v4"),
            ((17, 1), (33, 1), (57, 2), (67, 1), (300, 1)),
            ((1, 1), (16, 1), (34, 1), (64, 1)),
        ),
        (AttentionPagedSpec(64, 128, "v4", extra_topk=512), ((17, 1), (128, 1), (1, 4096)), ((64, 1),)),
        (AttentionPagedSpec(8, 512, "v41", d_rope=0), ((67, 1), (128, 1), (300, 1)), ((64, 1), (16, 1))),
        (AttentionPagedSpec(32, 2048), (), ((128, 1), (300, 1))),
        (AttentionPagedSpec(128, 2048), (), ((16, 1), (128, 1), (300, 1))),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else "",
)
def test_it_serves_what_it_is_known_to_serve_faster(spec, served, not_served):
    for sizes, wanted in (*((each, True) for each in served), *((each, False) for each in not_served)):
        config = OP.default_config(spec, AttentionPagedSizes(*sizes, 1 << 20), H200)
        assert (config.backend == "cuda" and config["sharers"] == 1) is wanted, sizes
