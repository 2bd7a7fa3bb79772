"""Sparse grouped-query attention: its kernels against the formula, the formula against dense attention, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.attention_gqa import OP, AttentionGqaSizes, AttentionGqaSpec
from dsa_codegen.ops.attention_gqa.problem import sharing
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import H200, assert_compiles, assert_matches_reference

BLOCKS = AttentionGqaSpec(12, 2, 64, 32, topk=5, block=32, ends=True)
TOKENS = AttentionGqaSpec(4, 2, 48, 80, topk=70, lengths=True, sink=True)
PAGED = AttentionGqaSpec(6, 3, 32, 32, topk=4, block=64, page=64, ends=True, lengths=True, sink=True)
SPECS = [BLOCKS, TOKENS, PAGED, replace(PAGED, block=4, topk=19, page=24), replace(BLOCKS, lengths=True, share=4)]
RAGGED = Case(AttentionGqaSizes(4, 150), "ragged")
SMALL = Config.of("triton", block_h=16, block_n=32, num_stages=3, num_warps=4, splits=1)


def config(spec: AttentionGqaSpec, **changes) -> Config:
    """A small one, of as many rows as the spec's rows that share have."""
    return SMALL.replace(block_h=32 if spec.share > 1 else 16, **changes)


@pytest.mark.parametrize(
    ("spec", "splits"), [*((spec, 1) for spec in SPECS), (PAGED, 3)], ids=lambda value: getattr(value, "id", value)
)
def test_matches_the_reference(interpreter, spec, splits):
    assert_matches_reference(interpreter, OP, spec, config(spec, splits=splits), RAGGED)


@pytest.mark.parametrize("case", [case for case in OP.cases(BLOCKS) if case.sizes.tokens < 100], ids=lambda case: case.id)
@pytest.mark.parametrize("spec", [BLOCKS, PAGED], ids=lambda spec: spec.id)
def test_next_to_nothing(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, config(spec), case)


def test_heads_of_a_group_in_several_blocks(interpreter):
    spec = AttentionGqaSpec(34, 1, 32, 32, topk=9, block=16)
    assert_matches_reference(interpreter, OP, spec, SMALL, RAGGED)
    assert_matches_reference(interpreter, OP, replace(spec, heads=20, share=2), SMALL.replace(block_h=32), RAGGED)


def dense(inputs, heads):
    """Causal attention over all tokens, by torch."""
    k, v = (inputs[name].float().repeat_interleave(heads // inputs["k"].shape[1], 1).transpose(0, 1) for name in ("k", "v"))
    seen = torch.arange(k.shape[1]) < inputs["ends"][:, None]
    q = inputs["q"].float().transpose(0, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=inputs["sm_scale"]).transpose(0, 1)


@pytest.mark.parametrize("block", [1, 16, 128])
def test_the_formula_is_dense_attention_over_lists_of_everything(block):
    entries = -(-300 // block)
    spec = AttentionGqaSpec(6, 2, 32, 48, entries, block, ends=True)
    inputs = dict(OP.inputs(spec, Case(AttentionGqaSizes(7, 300), "random"), Draw(0)))
    inputs["ends"] = torch.arange(1, 300, 43, dtype=torch.int32)
    torch.testing.assert_close(OP.reference(spec, inputs)["out"], dense(inputs, 6))


def test_pages_hold_what_rows_hold():
    spec = replace(PAGED, sink=False)
    paged = dict(OP.inputs(spec, Case(AttentionGqaSizes(6, 320), "random"), Draw(1)))
    found = OP.reference(spec, paged)
    for row in range(6):
        pages = paged["page_table"][row].long()
        flat = {**paged, "page_table": None, "k": paged["k"][pages].flatten(0, 1), "v": paged["v"][pages].flatten(0, 1)}
        flat |= {name: paged[name][row : row + 1] for name in ("q", "indices", "ends", "lengths")}
        alone = OP.reference(replace(spec, page=0), flat)
        torch.testing.assert_close(found["out"][row : row + 1], alone["out"])


def paged(**changes):
    """Arguments of the paged function, of two sequences with two new queries each."""
    inputs = OP.inputs(replace(PAGED, share=2), Case(AttentionGqaSizes(4, 150), "random"), Draw(3))
    rows = {name: inputs[name].unflatten(0, (2, 2)) for name in ("q", "indices", "ends", "lengths")}
    given = {"k_cache": inputs["k"], "v_cache": inputs["v"], **rows, **{name: inputs[name] for name in ("page_table", "sink")}}
    return inputs, {**given, "sm_scale": inputs["sm_scale"], "block": 64, **changes}


def test_the_paged_function_is_the_formula_over_pages():
    inputs, given = paged()
    wanted = OP.reference(PAGED, inputs)
    buffers = {"out": torch.empty(2, 2, 6, 32).bfloat16(), "lse": torch.empty(2, 2, 6)}
    for options in ({}, {"share": 2}, buffers, {"out": buffers["out"]}, {"batch_invariant": True}):
        out, lse = dsa.sparse_attention_gqa_paged(**given, **options)
        torch.testing.assert_close(out.flatten(0, 1), wanted["out"].bfloat16())
        torch.testing.assert_close(lse.flatten(0, 1), wanted["lse"])
        assert options.get("out") is None or out is options["out"]
    heads_outside = given["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    longs = {**given, "k_cache": heads_outside, "indices": given["indices"].long()}
    torch.testing.assert_close(dsa.sparse_attention_gqa_paged(**longs)[1].flatten(0, 1), wanted["lse"])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(4, 6, 32, dtype=torch.bfloat16)),
        ("k_cache", torch.zeros(7, 64, 4, 32, dtype=torch.bfloat16)),
        ("v_cache", torch.zeros(7, 48, 3, 32, dtype=torch.bfloat16)),
        ("indices", torch.zeros(2, 3, 3, 4, dtype=torch.int32)),
        ("ends", torch.zeros(4, dtype=torch.int32)),
        ("lengths", torch.zeros(2, 2, dtype=torch.int32)),
        ("page_table", torch.zeros(3, 3, dtype=torch.int32)),
        ("out", torch.zeros(2, 2, 6, 64, dtype=torch.bfloat16)),
        ("lse", torch.zeros(4, 6)),
    ],
)
def test_the_paged_function_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}:"):
        dsa.sparse_attention_gqa_paged(**paged(**{argument: value})[1])


def test_one_list_for_all_heads_is_read_as_it_lies():
    inputs = OP.inputs(replace(BLOCKS, kv_heads=1, heads=6), RAGGED, Draw(0))
    k, v = (inputs[name].expand(-1, 2, -1).contiguous() for name in ("k", "v"))
    given = {"block": 32, "ends": inputs["ends"]}
    listed = inputs["indices"].expand(-1, 2, -1)
    assert not listed.stride(1)
    q = inputs["q"].repeat(1, 2, 1)
    out, _ = dsa.sparse_attention_gqa(q, k, v, listed, inputs["sm_scale"], **given)
    alone, _ = dsa.sparse_attention_gqa(inputs["q"], k[:, :1], v[:, :1], inputs["indices"], inputs["sm_scale"], **given)
    torch.testing.assert_close(out, alone.repeat(1, 2, 1))


def test_an_entry_that_is_listed_twice_counts_twice():
    spec = AttentionGqaSpec(2, 1, 16, 16, topk=3)
    inputs = dict(OP.inputs(spec, Case(AttentionGqaSizes(1, 9), "random"), Draw(0)))
    once = OP.reference(spec, {**inputs, "indices": torch.tensor([[[4, -1, 9]]], dtype=torch.int32)})
    twice = OP.reference(spec, {**inputs, "indices": torch.tensor([[[4, -1, 4]]], dtype=torch.int32)})
    torch.testing.assert_close(twice["lse"], once["lse"] + torch.tensor(2.0).log())
    torch.testing.assert_close(twice["out"], once["out"])


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_planted_error_is_caught(name):
    inputs = OP.inputs(BLOCKS, RAGGED, Draw(0))
    reference = OP.reference(BLOCKS, inputs)
    wrong = {**reference, name: reference[name].roll(1, 1)}
    assert OP.check(BLOCKS, inputs, reference, reference).passed
    assert not OP.check(BLOCKS, inputs, wrong, reference).passed


ORDER = ["q", "k", "v", "indices", "sm_scale", "block", "ends", "page_table", "lengths", "sink", "share", "batch_invariant"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(4, 6, 32, dtype=torch.float16)),
        ("k", torch.zeros(7, 64, 4, 32, dtype=torch.bfloat16)),
        ("k", torch.zeros(7, 64, 32, dtype=torch.bfloat16)),
        ("v", torch.zeros(10, 64, 3, 32, dtype=torch.bfloat16)),
        ("indices", torch.zeros(4, 2, 4, dtype=torch.int32)),
        ("indices", torch.zeros(4, 3, 4)),
        ("ends", torch.zeros(5, dtype=torch.int32)),
        ("page_table", torch.zeros(3, 3, dtype=torch.int32)),
        ("lengths", torch.zeros(4, dtype=torch.int32)),
        ("sink", torch.zeros(3)),
        ("sm_scale", -1.0),
        ("block", 48),
        ("share", 3),
    ],
)
def test_call_refuses(argument, value):
    given = {**OP.inputs(PAGED, RAGGED, Draw(0)), "share": 1, "batch_invariant": False, argument: value}
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*(given[name] for name in ORDER))


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 129), ("kv_heads", 5), ("d_qk", 24), ("d_v", 272), ("topk", 0), ("block", 3), ("page", 1025), ("share", 8)],
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        AttentionGqaSpec.from_dict({**BLOCKS.to_dict(), field: value})


@pytest.mark.parametrize(
    ("asked", "joined"),
    [
        ((4, 16, 16, 0), 4),
        ((4, 32, 16, 0), 2),
        ((4, 16, 129, 0), 1),
        ((4, 16, 16, 2), 2),
        ((4, 16, 16, 1), 1),
        ((1, 1, 1, 4), 1),
    ],
)
def test_as_many_rows_share_as_can(asked, joined):
    assert sharing(*asked) == joined


@pytest.mark.parametrize("changes", [{"page": 64}, {"share": 4}], ids=str)
def test_compiles_for_hopper(changes):
    spec = replace(AttentionGqaSpec(64, 4, 128, 128, topk=16, block=128, ends=True), **changes)
    assert_compiles(OP, spec, OP.default_config(spec, OP.workloads(spec)[0].sizes, H200))
