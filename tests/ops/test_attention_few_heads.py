"""Sparse MLA prefill of up to 32 heads in CUDA C++: a ring of tiles for two groups, and neighbours that share a list."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify

import emulator
from attention_configs import RING
from support import FURTHER, H200, assert_compiles, completed

IN_A_BLOCK = [
    (AttentionSpec(20, 512, topk=33, lengths=True), RING.replace(num_stages=9, consumer_registers=216), "descending"),
    (AttentionSpec(16, 576, topk=96, sink=True), RING, "shuffled"),
    (AttentionSpec(3, 512, topk=150, lengths=True, sink=True, max_logits=True), RING.replace(num_stages=5), "shuffled"),
    # Tiles that come as a whole: a last piece that is not full, columns of the output that do not divide a group's threads.
    (AttentionSpec(32, 160, topk=70, lengths=True, d_v=128), RING.replace(num_stages=5), "shuffled"),
    (AttentionSpec(9, 208, topk=150, sink=True, max_logits=True, d_v=192), RING.replace(num_stages=3), "descending"),
]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "config", "order"),
    IN_A_BLOCK,
    ids=lambda value: str(value) if isinstance(value, str) else value.id if isinstance(value, AttentionSpec) else "",
)
def test_few_heads_match_the_reference(spec, config, order, tmp_path):
    """On one SM: its two groups take several queries, and the ring goes round."""
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, order)
    variant = Variant(OP, spec, config, replace(H200, sms=1), kernels)
    for case in OP.cases(spec):
        accuracy = verify(variant, case, "cpu")
        assert accuracy.passed, (case.id, accuracy.detail)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_neighbours_that_share_match_the_reference(tmp_path):
    """Whatever their lists: alike, in any order, with what is no token in front, with a token named twice."""
    spec, config = (
        AttentionSpec(3, 576, 40, lengths=True, sink=True, share=4),
        RING.replace(num_stages=6, consumer_registers=216),
    )
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, "shuffled")
    variant = Variant(OP, spec, config, replace(H200, sms=1), kernels)
    for case in OP.cases(spec):
        accuracy = verify(variant, case, "cpu")
        assert accuracy.passed, (case.id, accuracy.detail)
    inputs = dict(OP.inputs(spec, Case(AttentionSizes(9, 70), "random"), Draw(3)))
    inputs["lengths"][:] = 40
    lists = inputs["indices"][:, 0]
    lists[1] = lists[0].flip(0)
    lists[3, :20] = -1
    lists[5, 1::2] = lists[5, ::2]
    lists[6, 30:] = 70
    outputs = OP.allocate(spec, inputs)
    launches = variant.launch(inputs, outputs)
    assert OP.check(spec, inputs, outputs, OP.reference(spec, inputs)).passed
    assert [launch.kernel for launch in launches] == ["unite", "attention"]
    unions, counts = launches[0].args[2:4]
    entries = unions[0, : counts[0]].tolist()
    wanted = {token: sum(1 << m for m in range(4) if token in lists[m]) for token in lists[:4].flatten().tolist() if token >= 0}
    assert len(entries) == len(wanted) < 140
    assert {entry & (1 << 28) - 1: entry >> 28 & 15 for entry in entries} == wanted
    assert counts.tolist()[1:] == [150, 40]  # nothing is joined with what is named twice; a bundle of one query


def test_as_many_queries_share_as_fit_the_columns():
    def columns(heads, share):
        spec = AttentionSpec(heads, 576, 64, share=share)
        source = render.render(OP, spec, OP.default_config(spec, AttentionSizes(64, 64), H200)).code
        return [int(found) for found in re.findall(r"constexpr int (?:HEAD_COLUMNS|SHARE) = (\d+)", source)]

    assert [columns(8, share) for share in (1, 2, 4)] == [[8, 1], [8, 2], [8, 4]]
    assert [columns(16, share) for share in (1, 2, 4)] == [[16, 1], [16, 2], [16, 2]]
    assert columns(32, 4) == [32, 1]
    # A call with more heads is one without the option, whose records serve it.
    for heads, expected in ((8, 4), (9, 2), (16, 2), (17, 1), (128, 1)):
        q, kv, lists = torch.zeros(2, heads, 576), torch.zeros(3, 1, 576), torch.zeros(2, 1, 5, dtype=torch.int32)
        assert OP.bind(*completed(OP, q, kv, lists, 1.0, None, None, 4))[0].share == expected


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(8, 576, 2048, share=4), RING.replace(num_stages=6, consumer_registers=216)),
        (AttentionSpec(16, 576, 2048, lengths=True, sink=True, max_logits=True), RING),
        (AttentionSpec(32, 576, 2048), RING.replace(num_stages=6, consumer_registers=216)),
        (AttentionSpec(32, 512, 512, sink=True), RING.replace(num_stages=9, consumer_registers=216)),
        (AttentionSpec(32, 160, 2048, d_v=128), RING.replace(num_stages=8)),
        pytest.param(AttentionSpec(32, 256, 512, lengths=True, d_v=256), RING.replace(num_stages=5), marks=FURTHER),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionSpec) else "",
)
def test_few_heads_compile_for_hopper(spec, config):
    assert_compiles(OP, spec, config)
    built = build.find(render.render(OP, spec, config), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize(
    ("config", "heads", "name"),
    [
        (RING.replace(turns=True), 16, "turns"),
        (RING.replace(num_stages=13), 16, "smem"),
        (RING, 17, "accumulator registers"),
        (RING.replace(num_stages=4), 8, "stages of a tile"),
    ],
    ids=lambda value: "" if isinstance(value, Config) else str(value).replace(" ", "_"),
)
def test_constraints_of_few_heads(config, heads, name):
    assert [violation.name for violation in OP.violations(AttentionSpec(heads, 512, 512), config, H200)] == [name]


@pytest.mark.parametrize(("d_qk", "least"), [(576, 4), (512, 5)])
def test_the_ring_of_few_heads_holds_more_than_a_tile(d_qk, least):
    """With a tile's parts alone a group read tiles that had not come, and the GPU lost the context."""
    spec = AttentionSpec(24, d_qk, 1024)
    (choices,) = (parameter.choices for parameter in OP.parameters("cuda") if parameter.name == "num_stages")
    configs = [RING.replace(num_stages=stages, consumer_registers=216) for stages in choices]
    assert min(config["num_stages"] for config in configs if not OP.violations(spec, config, H200)) == least
