"""Sparse decode of few rows of many heads: blocks that load a tile at once, and attend to it for 64 heads after 64 heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

import emulator
from paged_designs import CLUSTERS, assert_emulated
from support import FURTHER, H200, assert_compiles

TWO_POOLS = AttentionPagedSpec(40, 70, "v4", lengths=True, sink=True, extra_topk=300, extra_page=2, extra_lengths=True)
WITHOUT_TAIL = AttentionPagedSpec(20, 300, "v41", 64, lengths=True, sink=True, d_rope=0)
IN_ROUNDS = [
    (AttentionPagedSpec(70, 140, lengths=True, sink=True), 2, 128),
    (AttentionPagedSpec(70, 45, "v4", lengths=True), 2, 96),
    (AttentionPagedSpec(5, 140, "v4", 53, lengths=True, sink=True), 1, 128),
    (AttentionPagedSpec(40, 140, lengths=True), 1, 64),
    pytest.param(AttentionPagedSpec(128, 300), 1, 128, marks=FURTHER),
    pytest.param(AttentionPagedSpec(128, 300), 1, 96, marks=FURTHER),
    pytest.param(AttentionPagedSpec(128, 300, lengths=True), 2, 96, marks=FURTHER),
    pytest.param(AttentionPagedSpec(70, 140, lengths=True), 2, 64, marks=FURTHER),
    pytest.param(AttentionPagedSpec(70, 1900, "v4", lengths=True), 2, 96, marks=FURTHER),
    pytest.param(AttentionPagedSpec(8, 2100, lengths=True), 1, 64, marks=FURTHER),
    pytest.param(AttentionPagedSpec(20, 300, lengths=True, sink=True), 1, 64, marks=FURTHER),
    pytest.param(TWO_POOLS, 1, 128, marks=FURTHER),
    pytest.param(replace(TWO_POOLS, heads=30), 1, 128, marks=FURTHER),
    pytest.param(WITHOUT_TAIL, 1, 128, marks=FURTHER),
    pytest.param(replace(WITHOUT_TAIL, heads=128), 2, 128, marks=FURTHER),
]


def in_rounds(rounds, tokens=128):
    return CLUSTERS.replace(head_rounds=rounds, tile_tokens=tokens)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "rounds", "tokens"), IN_ROUNDS, ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else None
)
def test_rounds_match_the_reference(spec, rounds, tokens, tmp_path):
    """Both kernels: shares of a tile, of less, of none; more parts than the join loads at once; rows without a token."""
    assert_emulated(spec, in_rounds(rounds, tokens), tmp_path)


@pytest.mark.parametrize(
    ("spec", "rounds"),
    [
        (AttentionPagedSpec(128, 2048), 2),
        pytest.param(TWO_POOLS, 1, marks=FURTHER),
        pytest.param(WITHOUT_TAIL, 1, marks=FURTHER),
    ],
)
def test_blocks_of_rounds_compile_for_hopper(spec, rounds):
    assert_compiles(OP, spec, in_rounds(rounds), spills=16)
    built = build.find(render(OP, spec, in_rounds(rounds)), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


def test_a_block_that_joins_has_room_beside_one_round():
    """A quarter of an SM has 16384 registers, which a thread gets by eights; an SM keeps 1 KB of each block's memory."""
    spec = AttentionPagedSpec(64, 2048)
    found = build.build(render(OP, spec, in_rounds(1)), H200).resources
    main, join = found["attention_paged"], found["join"]
    registers = sum(each.threads // 128 * 32 * -(-each.registers // 8) * 8 for each in (main, join))
    assert registers <= H200.regs_per_sm // 4
    assert main.smem + join.smem + 2 * 1024 <= H200.smem_per_sm


@pytest.mark.parametrize(
    ("heads", "topk", "rounds", "tokens", "rows", "blocks", "splits", "joins"),
    [
        (64, 2048, 1, 128, 8, 128, 16, 256),
        (128, 2048, 2, 128, 8, 128, 16, 768),
        (128, 2048, 2, 96, 6, 132, 22, 576),
        (64, 2048, 1, 64, 4, 128, 32, 128),
        (128, 300, 1, 128, 4, 32, 4, 256),
        (32, 2048, 1, 128, 8, 128, 16, 128),
        (5, 45, 1, 128, 2, 4, 2, 16),
    ],
)
def test_a_row_is_cut_so_that_each_block_has_a_tile(heads, topk, rounds, tokens, rows, blocks, splits, joins):
    spec = AttentionPagedSpec(heads, topk, sink=True, lengths=True)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 90), "ragged"), Draw(0, "meta"))
    main, join = OP.launches(spec, in_rounds(rounds, tokens), inputs, OP.allocate(spec, inputs), H200)
    namespace: dict = {}
    exec(render(OP, spec, in_rounds(rounds, tokens)).code, namespace)
    assert (main.grid[0], main.args[-2], join.args[-1]) == (blocks, splits, splits // 2)
    # A warp for each eight heads that one of 16 warps left, of two rounds for some of the parts.
    assert join.grid == (joins, 1, 1)
    for launch in (main, join):
        kinds = namespace["KERNELS"][launch.kernel]["args"]
        assert [isinstance(value, torch.Tensor) for value in launch.args] == [kind == "ptr" for kind in kinds]


@pytest.mark.parametrize(
    ("spec", "config", "names"),
    [
        (AttentionPagedSpec(128, 2048), in_rounds(2), []),
        (AttentionPagedSpec(64, 2048), in_rounds(1), []),
        (AttentionPagedSpec(128, 2048), in_rounds(2).replace(splits=4), ["splits beside head_rounds"]),
        (AttentionPagedSpec(64, 2048), in_rounds(2), ["head_rounds"]),
        (AttentionPagedSpec(64, 2048), in_rounds(1).replace(sharers=2), ["sharers beside head_rounds"]),
        (AttentionPagedSpec(64, 2048, "bf16"), in_rounds(1), ["layout"]),
        (AttentionPagedSpec(64, 2048), in_rounds(1, 96), []),
        (AttentionPagedSpec(32, 2048), in_rounds(1, 64), []),
        (AttentionPagedSpec(32, 2048), in_rounds(1, 96), ["tile_tokens of few heads"]),
        (AttentionPagedSpec(64, 2048), in_rounds(0, 64), ["tile_tokens beside other designs"]),
    ],
)
def test_what_rounds_cannot_do(spec, config, names):
    assert [violation.name for violation in OP.violations(spec, config, H200)] == names


def test_rounds_are_of_few_rows():
    def reach(rows):
        bucket = AttentionPagedSizes(rows, 1, 4096).bucket()
        return [violation.name for violation in OP.reach(AttentionPagedSpec(128, 2048), in_rounds(2), bucket)]

    assert (reach(16), reach(64)) == ([], ["blocks of head_rounds"])


def test_older_records_have_none():
    assert OP.config("cuda", {"splits": 0, "sharers": 0, "columns": 0}) == in_rounds(0)
    assert OP.config("cuda", {"splits": 0, "sharers": 0, "columns": 0, "head_rounds": 2}) == in_rounds(2)


def test_the_order_of_summation_is_that_of_the_parts():
    """Which do not depend on the other rows; of the first of two rounds blocks leave parts that two did not join."""
    orders = [OP.order(AttentionPagedSpec(128, 2048), in_rounds(*config)) for config in [(1,), (2,), (2, 96)]]
    assert orders == ["cuda-rounds-1-128", "cuda-rounds-2-128", "cuda-rounds-2-96"]


@pytest.mark.parametrize(
    ("heads", "topk", "batch", "next_n", "rounds", "tokens"),
    [
        (64, 2048, 8, 1, 1, 128),
        (64, 2048, 6, 1, 1, 96),
        (64, 2048, 4, 1, 1, 64),
        (64, 2048, 1, 1, 0, 128),  # half of the SMs would be idle: clusters of columns take less
        (128, 2048, 8, 1, 2, 128),  # a block of its own for each 64 heads would not run at once
        (128, 2048, 2, 2, 1, 128),
        (128, 2048, 5, 1, 2, 96),
        (128, 2048, 7, 1, 2, 128),  # one choice for the whole bucket
        (128, 2048, 3, 1, 1, 96),
        (128, 2048, 2, 1, 1, 64),
        (128, 2048, 1, 1, 1, 64),
        (64, 2048, 16, 1, 0, 128),
        (64, 640, 8, 1, 1, 64),
        (64, 640, 4, 1, 0, 128),
        (64, 640, 16, 1, 1, 96),
        (128, 640, 16, 1, 2, 96),
        (64, 8192, 1, 1, 0, 128),
        (64, 1024, 16, 1, 1, 128),
        (16, 2048, 8, 1, 0, 128),  # tokens stream through blocks
        (16, 2048, 4, 1, 1, 64),
        (32, 2048, 2, 1, 0, 128),
        (40, 2048, 8, 1, 1, 128),
    ],
)
def test_a_few_rows_of_long_lists_are_served_in_rounds(heads, topk, batch, next_n, rounds, tokens):
    config = OP.default_config(AttentionPagedSpec(heads, topk), AttentionPagedSizes(batch, next_n, 1 << 17), H200)
    found = (config["head_rounds"], config["tile_tokens"]) if config.backend == "cuda" else (0, 128)
    assert found == (rounds, tokens)
