"""Sparse MLA prefill: Triton's kernel against the reference, what it and TileLang's compile to, what a call means."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

from attention_configs import MULTISTAGE, SPECIALISED, TRITON
from support import FURTHER, assert_compiles, assert_matches_reference, completed

SPECS = [
    AttentionSpec(5, 576, topk=70),
    AttentionSpec(20, 512, topk=33, lengths=True),
    AttentionSpec(16, 576, topk=96, sink=True),
    AttentionSpec(1, 512, topk=1, lengths=True, sink=True),
    AttentionSpec(5, 576, topk=70, lengths=True, sink=True, max_logits=True),
    AttentionSpec(32, 160, topk=70, d_v=128),
    AttentionSpec(9, 448, topk=50, lengths=True, d_v=336),
]
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, TRITON, case)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        pytest.param(AttentionSpec(128, 576, 2048), SPECIALISED, marks=FURTHER),
        pytest.param(AttentionSpec(64, 512, 512, sink=True), SPECIALISED, marks=FURTHER),
        pytest.param(AttentionSpec(20, 576, 130, lengths=True, sink=True), SPECIALISED, marks=FURTHER),
        pytest.param(AttentionSpec(5, 576, 37, lengths=True, sink=True), MULTISTAGE, marks=FURTHER),
        pytest.param(AttentionSpec(32, 512, 512), MULTISTAGE.replace(block_h=32, block_n=64, threads=256), marks=FURTHER),
        pytest.param(AttentionSpec(128, 576, 2048), MULTISTAGE.replace(block_h=64, num_stages=3, threads=256), marks=FURTHER),
        (AttentionSpec(16, 576, 2048, lengths=True), TRITON),
        (AttentionSpec(16, 576, 2048, max_logits=True), TRITON),
        pytest.param(AttentionSpec(128, 576, 2048, max_logits=True), SPECIALISED, marks=FURTHER),
        (AttentionSpec(64, 512, 512, lengths=True, sink=True, max_logits=True), SPECIALISED),
        pytest.param(AttentionSpec(5, 576, 37, max_logits=True), MULTISTAGE, marks=FURTHER),
        (AttentionSpec(128, 576, 2048, sink=True), TRITON.replace(block_h=64, num_stages=5, num_warps=8)),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionSpec) else value.to_dict().get("pipeline", value.backend),
)
def test_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


def test_steep_scores_rise_by_hundreds_within_a_row():
    spec = AttentionSpec(2, 576, 64)
    inputs = OP.inputs(spec, Case(AttentionSizes(4, 300), "steep"), Draw(0))
    latent = inputs["kv"][inputs["indices"][:, 0].long(), 0].float()
    scores = torch.einsum("qhd,qkd->qhk", inputs["q"].float(), latent) * inputs["sm_scale"]
    assert (scores[..., 32:].amax(-1) - scores[..., :32].amax(-1)).abs().max() > 30
    assert scores.abs().amax() > 100


@pytest.mark.parametrize("name", [name for name in presets.names() if OP.specs(presets.preset(name))])
def test_every_preset_has_a_spec(name):
    model = presets.preset(name)
    spec = OP.specs(model)[0]
    assert (spec.heads, spec.topk, spec.sink) == (model.heads, model.entries, model.attn_sink)
    assert (spec.d_qk, spec.d_v) == (model.d_nope + model.d_rope, model.d_v)


@pytest.mark.parametrize(
    ("field", "value"), [("share", 3), ("heads", 0), ("heads", 129), ("d_qk", 656), ("topk", 0), ("sink", 1)]
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        AttentionSpec.from_dict({"heads": 64, "d_qk": 576, "topk": 64, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    spec = AttentionSpec(4, 576, 8, lengths=True, sink=True)
    return list({**OP.inputs(spec, Case(AttentionSizes(3, 20), "ragged"), Draw(0)), "share": 1, **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 4, 576, dtype=torch.float16)),
        ("kv", torch.zeros(20, 1, 512, dtype=torch.bfloat16)),
        ("indices", torch.zeros(3, 1, 8, dtype=torch.int64)),
        ("indices", torch.zeros(2, 1, 8, dtype=torch.int32)),
        ("sm_scale", 0.0),
        ("sm_scale", math.nan),
        ("lengths", torch.zeros(4, dtype=torch.int32)),
        ("sink", torch.zeros(3)),
        ("share", 3),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*completed(OP, *arguments(**{argument: value})))


def test_bind_reads_the_spec_off_the_arguments():
    spec, sizes, _ = OP.bind(*completed(OP, *arguments()))
    assert (spec, sizes) == (AttentionSpec(4, 576, 8, lengths=True, sink=True), AttentionSizes(3, 20))
    assert not OP.bind(*completed(OP, *arguments(lengths=None, sink=None)))[0].sink
    assert OP.bind(*completed(OP, *arguments(share=4)))[0].share == 4


def test_lists_shorter_than_k_are_padded_and_name_no_token_twice():
    indices = OP.inputs(AttentionSpec(1, 512, 9), Case(AttentionSizes(2, 5), "random"), Draw(0))["indices"][:, 0]
    assert indices.sort().values.tolist() == [[-1, -1, -1, -1, 0, 1, 2, 3, 4]] * 2


def test_max_logits_are_the_highest_scores():
    spec = AttentionSpec(3, 576, 16, max_logits=True)
    inputs = OP.inputs(spec, Case(AttentionSizes(4, 30), "ragged"), Draw(0))
    outputs = OP.reference(spec, inputs)
    for query, listed in enumerate(inputs["indices"][:, 0]):
        kept = inputs["kv"][listed[(listed >= 0) & (listed < 30)].long(), 0].float()
        scores = inputs["q"][query].float() @ kept.T * inputs["sm_scale"]
        expected = scores.amax(-1) if len(kept) else torch.full((3,), -math.inf)
        torch.testing.assert_close(outputs["max_logits"][query], expected)


def test_the_sink_takes_weight_from_the_tokens_but_leaves_lse():
    inputs = OP.inputs(AttentionSpec(3, 512, 16), Case(AttentionSizes(2, 30), "random"), Draw(0))
    plain = OP.reference(AttentionSpec(3, 512, 16), inputs)
    # A sink as heavy as all tokens together halves the output.
    even = OP.reference(AttentionSpec(3, 512, 16, sink=True), {**inputs, "sink": plain["lse"][0]})
    torch.testing.assert_close(even["out"][0], plain["out"][0] / 2)
    torch.testing.assert_close(even["lse"], plain["lse"])
