"""Sparse decode of few rows: clusters whose blocks share a row's entries and join what they found in each other's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.problem.values import contains

import emulator
from paged_designs import CASES, CLUSTERS, assert_emulated
from support import FURTHER, H200, assert_compiles

TWO_POOLS = AttentionPagedSpec(40, 70, "v4", lengths=True, sink=True, extra_topk=300, extra_page=2, extra_lengths=True)
BY_SHARERS = [
    (AttentionPagedSpec(5, 45, "v4", 53, lengths=True, sink=True), 2),
    (AttentionPagedSpec(16, 700, "v4"), 2),
    (AttentionPagedSpec(40, 300, page=7, lengths=True, sink=True), 2),
    (AttentionPagedSpec(8, 300, "v41", d_rope=0, lengths=True, sink=True), 2),
    pytest.param(AttentionPagedSpec(3, 64, sink=True), 16, marks=FURTHER),
    pytest.param(TWO_POOLS, 4, marks=FURTHER),
    pytest.param(AttentionPagedSpec(5, 300, "fp8_fp32_128", 7, d_rope=0, extra_topk=90, extra_page=2), 2, marks=FURTHER),
    pytest.param(AttentionPagedSpec(100, 400, page=7, lengths=True), 4, marks=FURTHER),
]


def shared(sharers):
    return CLUSTERS.replace(sharers=sharers)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "sharers"), BY_SHARERS, ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else ""
)
def test_shared_entries_match_the_reference(spec, sharers, tmp_path):
    """All blocks of a cluster at once: shares of several tiles, of one, of none; rows without a token."""
    assert_emulated(spec, shared(sharers), tmp_path, (*CASES, ((2, 1, 333), "ragged")))


@pytest.mark.parametrize(
    ("spec", "sharers"),
    [
        (TWO_POOLS, 8),
        (AttentionPagedSpec(64, 2048), 2),
        pytest.param(AttentionPagedSpec(64, 512, "v41", d_rope=0, sink=True), 2, marks=FURTHER),
        pytest.param(AttentionPagedSpec(128, 2048), 16, marks=FURTHER),
        pytest.param(AttentionPagedSpec(16, 2048, lengths=True), 2, marks=FURTHER),
    ],
)
def test_clusters_of_sharers_compile_for_hopper(spec, sharers):
    assert_compiles(OP, spec, shared(sharers), spills=32)  # of what all groups need, for the one with 72 registers
    built = build.find(render(OP, spec, shared(sharers)), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize(
    ("heads", "rows", "sharers", "blocks"), [(128, 1, 8, 16), (64, 1, 8, 8), (3, 2, 8, 16), (65, 5, 8, 80)]
)
def test_each_row_and_64_heads_have_a_cluster(heads, rows, sharers, blocks):
    spec = AttentionPagedSpec(heads, 70, sink=True, lengths=True)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 90), "ragged"), Draw(0))
    (launch,) = OP.launches(spec, shared(sharers), inputs, OP.allocate(spec, inputs), H200)
    namespace: dict = {}
    exec(render(OP, spec, shared(sharers)).code, namespace)
    facts = namespace["KERNELS"][launch.kernel]
    assert launch.grid == (blocks, 1, 1)
    assert facts["cluster"] == sharers
    assert [isinstance(value, torch.Tensor) for value in launch.args] == [kind == "ptr" for kind in facts["args"]]


def test_whole_rows_are_shared():
    found = OP.violations(AttentionPagedSpec(64, 2048), shared(8).replace(splits=2), H200)
    assert [violation.name for violation in found] == ["splits beside sharers"]


def test_older_records_have_none():
    assert OP.config("cuda", {"splits": 3}) == shared(0).replace(splits=3)


def test_the_order_of_summation_is_the_clusters_size():
    orders = [OP.order(AttentionPagedSpec(64, 2048), shared(sharers)) for sharers in (2, 4)]
    assert orders == ["cuda-sharers-2", "cuda-sharers-4"]


@pytest.mark.parametrize(
    ("heads", "batch", "next_n", "sharers", "columns"),
    [
        (128, 1, 1, 8, 16),  # 8 clusters of 16 are more than run at once
        (128, 2, 1, 6, 16),
        (64, 1, 1, 10, 16),  # 64 entries each
        (64, 4, 1, 6, 16),
        (128, 8, 1, 0, 0),  # of 32 heads 32 clusters, whose blocks would have more than a tile: rounds of 64 heads
        (64, 8, 1, 0, 0),  # rounds of small tiles
        (64, 5, 1, 8, 32),
        (128, 16, 1, 0, 0),
        (64, 1, 4, 6, 16),
        (128, 64, 1, 0, 0),
        (64, 64, 1, 0, 0),
        (16, 128, 1, 0, 0),
        (16, 1, 1, 10, 16),
    ],
)
def test_few_rows_are_shared_by_as_many_blocks_as_run_at_once(heads, batch, next_n, sharers, columns):
    spec = AttentionPagedSpec(heads, 128, "v4", 256, extra_topk=512)
    config = OP.default_config(spec, AttentionPagedSizes(batch, next_n, 1 << 17), H200)
    assert ((config["sharers"], config["columns"]) if config.backend == "cuda" else (0, 0)) == (sharers, columns)
    longer = replace(spec, extra_topk=4096)
    for rows in ((1, 1), (148, 2)):
        config = OP.default_config(longer, AttentionPagedSizes(*rows, 1 << 20), H200)
        # One SM's share of all rows, or clusters that split channels.
        assert config.backend == "gluon" or config["sharers"] <= (1 if heads <= 64 else 0)


@pytest.mark.parametrize(
    ("heads", "k", "batch", "next_n", "pairs"),
    [
        (64, 2048, 64, 1, 2),
        (33, 2048, 57, 1, 2),
        (64, 2048, 65, 1, 1),
        (64, 2048, 56, 1, 1),  # every SM has a share of all rows
        (64, 2048, 57, 2, 1),  # two waves
        (64, 512, 64, 1, 0),
        (32, 2048, 64, 1, 0),
        (128, 2048, 64, 1, 0),
    ],
)
def test_rows_of_656_bytes_of_which_each_has_two_blocks_are_shared_by_them(heads, k, batch, next_n, pairs):
    config = OP.default_config(AttentionPagedSpec(heads, k), AttentionPagedSizes(batch, next_n, 1 << 20), H200)
    assert (config["sharers"] if config.backend == "cuda" else 0) == pairs


def test_every_range_of_many_sequences_is_tuned():
    """A call that no record serves is told to tune, which must help."""
    tuned = {case.sizes.bucket() for case in OP.workloads(AttentionPagedSpec(64, 2048))}
    for batch in (17, 33, 34, 56, 57, 64, 65, 112, 113, 132, 133, 511):
        assert AttentionPagedSizes(batch, 1, 1 << 20).bucket() in tuned


def test_many_rows_are_not_shared():
    """A record of few rows serves no prompt."""
    spec = AttentionPagedSpec(64, 512, "v4")
    for batch, next_n, names in ((1, 1, []), (8, 2, ["blocks of sharers"]), (64, 1, ["blocks of sharers"])):
        bucket = AttentionPagedSizes(batch, next_n, 1 << 17).bucket()
        assert [violation.name for violation in OP.reach(spec, shared(16), bucket)] == names


def test_records_of_wider_buckets_still_serve():
    for batch, next_n in ((17, 1), (33, 4), (34, 1), (64, 2)):
        assert contains((("batch", 17, 65),), AttentionPagedSizes(batch, next_n, 1 << 20).bucket())
    for batch in (2, 4, 8, 16):
        assert contains((("batch", 2, 17),), AttentionPagedSizes(batch, 1, 1 << 17).bucket())
