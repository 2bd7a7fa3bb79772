"""Sparse decode of few heads: whole tokens stream through blocks that attend to them, heads as columns."""

from __future__ import annotations

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

STREAMED = [
    (AttentionPagedSpec(5, 45, page=53, lengths=True, sink=True), 16, 0, 0),
    (AttentionPagedSpec(20, 300, lengths=True), 32, 1, 0),
    (AttentionPagedSpec(5, 300, page=53, lengths=True, sink=True), 16, 1, 16),
    (AttentionPagedSpec(20, 300, lengths=True), 32, 1, 8),
    pytest.param(AttentionPagedSpec(16, 300, sink=True), 16, 3, 0, marks=FURTHER),
    pytest.param(AttentionPagedSpec(40, 1400, lengths=True, sink=True), 32, 0, 0, marks=FURTHER),
    pytest.param(AttentionPagedSpec(16, 300, sink=True), 16, 3, 8, marks=FURTHER),
    pytest.param(AttentionPagedSpec(40, 1400, lengths=True, sink=True), 32, 0, 16, marks=FURTHER),
]


def streamed(columns, splits=0, placers=0):
    return CLUSTERS.replace(splits=splits, columns=columns, placers=placers)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "columns", "splits", "placers"),
    STREAMED,
    ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else "",
)
def test_streams_match_the_reference(spec, columns, splits, placers, tmp_path):
    """Both kernels: shares of several tiles, of one, of none; more parts than the join loads at once; rows without a token."""
    assert_emulated(spec, streamed(columns, splits, placers), tmp_path)


@pytest.mark.parametrize(
    ("heads", "columns", "placers"),
    [
        (16, 16, 0),
        (16, 16, 16),
        pytest.param(64, 32, 0, marks=FURTHER),
        pytest.param(16, 16, 8, marks=FURTHER),
        (32, 32, 8),
        pytest.param(32, 32, 16, marks=FURTHER),
    ],
)
def test_streams_compile_for_hopper(heads, columns, placers):
    spec, config = AttentionPagedSpec(heads, 2048), streamed(columns, placers=placers)
    assert_compiles(OP, spec, config)
    built = build.find(render(OP, spec, config), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize(
    ("heads", "columns", "splits", "placers", "rows", "parts"),
    [
        (16, 16, 0, 0, 8, 16),  # all blocks at once
        (40, 32, 0, 0, 8, 8),
        (16, 16, 0, 0, 1, 32),  # a tile a block
        (16, 16, 0, 16, 300, 1),
        (16, 16, 3, 8, 8, 3),
    ],
)
def test_rows_are_cut_so_that_all_blocks_run_at_once(heads, columns, splits, placers, rows, parts):
    spec = AttentionPagedSpec(heads, 2048, sink=True, lengths=True)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 90), "ragged"), Draw(0, "meta"))
    config, units = streamed(columns, splits, placers), rows * -(-heads // columns)
    main, join = OP.launches(spec, config, inputs, OP.allocate(spec, inputs), H200)
    namespace: dict = {}
    exec(render(OP, spec, config).code, namespace)
    assert (main.grid, main.args[-2], join.args[-1]) == ((units * parts, 1, 1), parts, parts)
    assert join.grid == (units * columns // 8 * 4, 1, 1)
    for launch in (main, join):
        kinds = namespace["KERNELS"][launch.kernel]["args"]
        assert [isinstance(value, torch.Tensor) for value in launch.args] == [kind == "ptr" for kind in kinds]


@pytest.mark.parametrize(
    ("spec", "config", "names"),
    [
        (AttentionPagedSpec(16, 2048), streamed(16), []),
        (AttentionPagedSpec(64, 2048), streamed(32, 4), []),
        (AttentionPagedSpec(8, 2048), streamed(32), ["columns beside heads"]),
        (AttentionPagedSpec(8, 2048), streamed(8), ["columns"]),
        (AttentionPagedSpec(16, 2048), streamed(16).replace(head_rounds=1, columns=16), ["columns beside head_rounds"]),
        (AttentionPagedSpec(16, 2048, "v4"), streamed(16), ["layout"]),
        (AttentionPagedSpec(16, 2048, "bf16"), streamed(16), ["layout"]),
        (AttentionPagedSpec(16, 128, extra_topk=512), streamed(16), ["layout"]),
        (AttentionPagedSpec(32, 2048), streamed(32, 0, 8), []),
        (AttentionPagedSpec(32, 2048), streamed(32, 0, 8).replace(sharers=4), ["placers beside other designs"]),
        (AttentionPagedSpec(32, 2048), CLUSTERS.replace(placers=8), ["placers beside other designs"]),
    ],
)
def test_what_streams_cannot_do(spec, config, names):
    assert [violation.name for violation in OP.violations(spec, config, H200)] == names


def test_the_order_of_summation_is_that_of_the_parts():
    orders = [OP.order(AttentionPagedSpec(16, 2048), streamed(*given)) for given in ((16,), (16, 4), (32, 4), (32, 4, 8))]
    assert orders == [None, "cuda-columns-16-4", "cuda-columns-32-4", "cuda-roles-32-4"]


@pytest.mark.parametrize(
    ("heads", "topk", "layout", "batch", "columns", "placers"),
    [
        (16, 2048, "v32", 1, 16, 0),
        (16, 2048, "v32", 8, 16, 16),
        (8, 2048, "v32", 64, 16, 16),
        (16, 2048, "v32", 128, 16, 16),
        (32, 2048, "v32", 1, 16, 0),  # 32 tiles: more blocks take less time than fewer with all heads
        (32, 2048, "v32", 2, 32, 0),
        (32, 2048, "v32", 8, 32, 8),
        (32, 2048, "v32", 64, 32, 16),
        (64, 2048, "v32", 8, 0, 0),
        (16, 512, "v32", 8, 0, 0),
        (16, 2048, "v4", 8, 0, 0),
    ],
)
def test_few_heads_with_long_lists_are_served_by_streams(heads, topk, layout, batch, columns, placers):
    config = OP.default_config(AttentionPagedSpec(heads, topk, layout), AttentionPagedSizes(batch, 1, 1 << 17), H200)
    streams = config.backend == "cuda" and not config["sharers"]
    assert ((config["columns"], config["placers"]) if streams else (0, 0)) == (columns, placers)
