"""Sparse decode of few rows, heads as columns: all tokens of a cluster's blocks are on their way at once."""

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

TWO_POOLS = AttentionPagedSpec(40, 70, "v4", lengths=True, sink=True, extra_topk=300, extra_page=2, extra_lengths=True)
WITHOUT_TAIL = AttentionPagedSpec(20, 300, "v41", 64, lengths=True, sink=True, d_rope=0)
BY_COLUMNS = [
    (AttentionPagedSpec(5, 45, "v4", 53, lengths=True, sink=True), 2, 16),
    (AttentionPagedSpec(33, 300, lengths=True), 2, 32),
    pytest.param(AttentionPagedSpec(16, 300, sink=True), 16, 16, marks=FURTHER),
    pytest.param(AttentionPagedSpec(13, 300, lengths=True, sink=True), 4, 8, marks=FURTHER),
    pytest.param(TWO_POOLS, 3, 32, marks=FURTHER),
    pytest.param(AttentionPagedSpec(16, 1400, lengths=True, sink=True), 2, 16, marks=FURTHER),
    pytest.param(WITHOUT_TAIL, 4, 32, marks=FURTHER),
]


def shared(sharers, columns):
    return CLUSTERS.replace(sharers=sharers, columns=columns)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "sharers", "columns"), BY_COLUMNS, ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else ""
)
def test_columns_match_the_reference(spec, sharers, columns, tmp_path):
    """All blocks of a cluster at once: shares of several tiles, of one, of none; rows without a token."""
    assert_emulated(spec, shared(sharers, columns), tmp_path)


@pytest.mark.parametrize(
    ("spec", "sharers", "columns"),
    [
        (WITHOUT_TAIL, 8, 32),
        pytest.param(TWO_POOLS, 8, 16, marks=FURTHER),
        pytest.param(AttentionPagedSpec(128, 2048), 16, 32, marks=FURTHER),
    ],
)
def test_clusters_of_columns_compile_for_hopper(spec, sharers, columns):
    assert_compiles(OP, spec, shared(sharers, columns), spills=32)
    built = build.find(render(OP, spec, shared(sharers, columns)), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize(("heads", "columns", "rows", "blocks"), [(128, 32, 1, 32), (3, 16, 2, 16), (65, 32, 5, 120)])
def test_each_row_and_its_columns_have_a_cluster(heads, columns, rows, blocks):
    spec = AttentionPagedSpec(heads, 70, sink=True, lengths=True)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 90), "ragged"), Draw(0))
    (launch,) = OP.launches(spec, shared(8, columns), inputs, OP.allocate(spec, inputs), H200)
    namespace: dict = {}
    exec(render(OP, spec, shared(8, columns)).code, namespace)
    facts = namespace["KERNELS"][launch.kernel]
    assert launch.grid == (blocks, 1, 1)
    assert facts["cluster"] == 8
    assert [isinstance(value, torch.Tensor) for value in launch.args] == [kind == "ptr" for kind in facts["args"]]


@pytest.mark.parametrize(
    ("spec", "config", "names"),
    [
        (AttentionPagedSpec(64, 2048), shared(8, 32), []),
        (AttentionPagedSpec(64, 2048), shared(8, 32).replace(splits=2), ["splits beside columns"]),
        (AttentionPagedSpec(8, 2048), shared(8, 32), ["columns beside heads"]),
        (AttentionPagedSpec(64, 2048, "bf16"), shared(8, 32), ["layout"]),
    ],
)
def test_columns_are_those_of_sharers(spec, config, names):
    assert [violation.name for violation in OP.violations(spec, config, H200)] == names


def test_older_records_have_none():
    assert OP.config("cuda", {"splits": 0, "sharers": 4}) == shared(4, 0)


def test_the_order_of_summation_is_the_clusters_and_the_tiles():
    orders = [OP.order(AttentionPagedSpec(64, 2048), shared(4, columns)) for columns in (0, 16, 32)]
    assert orders == ["cuda-sharers-4", "cuda-sharers-4-16", "cuda-sharers-4-32"]
