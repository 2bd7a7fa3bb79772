"""Sparse decode of few heads: whole tokens stream through blocks that attend to them, heads as columns."""

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


def launched(spec, config, rows, gpu=H200):
    """Both launches, whose arguments are of the kinds that the kernels take."""
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 90), "ragged"), Draw(0, "meta"))
    launches = OP.launches(spec, config, inputs, OP.allocate(spec, inputs), gpu)
    namespace: dict = {}
    exec(render(OP, spec, config).code, namespace)
    for launch in launches:
        kinds = namespace["KERNELS"][launch.kernel]["args"]
        assert [isinstance(value, torch.Tensor) for value in launch.args] == [kind == "ptr" for kind in kinds]
    return launches


@pytest.mark.parametrize(
    ("heads", "columns", "splits", "rows", "parts"),
    [(16, 16, 0, 8, 16), (40, 32, 0, 8, 8), (16, 16, 0, 1, 32), (16, 16, 3, 300, 3)],  # at once; a tile a block
)
def test_rows_are_cut_so_that_all_blocks_run_at_once(heads, columns, splits, rows, parts):
    spec, config = AttentionPagedSpec(heads, 2048, sink=True, lengths=True), streamed(columns, splits)
    main, join = launched(spec, config, rows)
    units = rows * -(-heads // columns)
    assert (main.grid, main.args[-2], join.args[-1]) == ((units * parts, 1, 1), parts, parts)
    assert join.grid == (units * columns // 8 * 4, 1, 1)


EVEN, TILES = 0xFFFFFFFF, 0xFFFFFFC0  # where entries are cut


@pytest.mark.parametrize(
    ("heads", "columns", "splits", "rows", "blocks", "taken"),
    [
        (16, 16, 3, 8, 24, (0, 1, 3, EVEN)),
        (16, 16, 3, 300, 900, (0, 1, 3, EVEN)),
        (16, 16, 0, 5, 130, (0, 1, 26, EVEN)),  # two tiles each; the second is short
        (16, 16, 0, 64, 128, (0, 1, 2, EVEN)),
        (16, 16, 0, 128, 128, (128, 0, 1, EVEN)),
        (16, 16, 1, 300, 300, (300, 0, 1, EVEN)),
        (16, 16, 0, 48, 132, (0, 4, 11, TILES)),  # 12 tiles instead of 16 of halves
        (16, 16, 0, 96, 132, (0, 8, 11, TILES)),  # 24 instead of 32
        (16, 16, 0, 264, 132, (264, 0, 1, TILES)),
        (16, 16, 0, 300, 132, (264, 3, 11, TILES)),  # 64 + 9 instead of 96
        (16, 16, 0, 133, 132, (132, 1, 32, TILES)),
        (40, 32, 0, 150, 132, (264, 3, 11, TILES)),
    ],
)
def test_blocks_with_roles_take_equal_shares(heads, columns, splits, rows, blocks, taken):
    spec, config = AttentionPagedSpec(heads, 2048, sink=True, lengths=True), streamed(columns, splits, 16)
    main, *joins = launched(spec, config, rows)
    units = rows * -(-heads // columns)
    assert (main.grid, (*main.args[-8:-4], main.args[-2])) == ((blocks, 1, 1), (units, *taken))
    joined = [((units - taken[0]) * columns // 8 * 4, 1, 1)] if units > taken[0] else []  # whole rows are nobody's part
    assert [join.grid for join in joins] == joined
    assert all(join.args[-3:] == taken[:3] for join in joins)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "columns", "placers"),
    [
        (AttentionPagedSpec(5, 300, page=53, lengths=True, sink=True), 16, 16),
        pytest.param(AttentionPagedSpec(40, 300), 32, 8, marks=FURTHER),
    ],
    ids=["16 columns", "32 columns"],
)
def test_shares_that_go_on_across_rows_match_the_reference(spec, columns, placers, tmp_path):
    """By GPUs of few SMs: rows whole and in shares, of one row, of several, of none; rows without a token between others."""
    for sms, sizes in ((1, (3, 1, 333)), (3, (7, 1, 333)), (3, (2, 2, 90)), (5, (3, 1, 300))):
        assert_emulated(spec, streamed(columns, 0, placers), tmp_path, ((sizes, "ragged"),), replace(H200, sms=sms))


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
        (32, 2048, "v32", 64, 32, 8),
        (64, 2048, "v32", 8, 0, 0),
        (16, 512, "v32", 8, 0, 0),
        (16, 2048, "v4", 8, 0, 0),
    ],
)
def test_few_heads_with_long_lists_are_served_by_streams(heads, topk, layout, batch, columns, placers):
    config = OP.default_config(AttentionPagedSpec(heads, topk, layout), AttentionPagedSizes(batch, 1, 1 << 17), H200)
    streams = config.backend == "cuda" and not config["sharers"]
    assert ((config["columns"], config["placers"]) if streams else (0, 0)) == (columns, placers)
