"""Sparse MLA prefill: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec
from dsa_codegen.ops.attention.problem import D_V
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import H200, assert_compiles, assert_matches_reference, default

SPECS = [
    AttentionSpec(5, 576, topk=70),
    AttentionSpec(20, 512, topk=33, lengths=True),
    AttentionSpec(16, 576, topk=96, sink=True),
    AttentionSpec(1, 512, topk=1, lengths=True, sink=True),
    AttentionSpec(5, 576, topk=70, lengths=True, sink=True, max_logits=True),
]
TRITON = Config.of("triton", block_h=16, block_n=32, num_stages=3, num_warps=4)
MULTISTAGE = Config.of("tilelang", pipeline="multistage", block_h=16, block_n=32, num_stages=2, threads=128)
SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384)
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, TRITON, case)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(128, 576, 2048), SPECIALISED),
        (AttentionSpec(64, 512, 512, sink=True), SPECIALISED),
        (AttentionSpec(20, 576, 130, lengths=True, sink=True), SPECIALISED),
        (AttentionSpec(5, 576, 37, lengths=True, sink=True), MULTISTAGE),
        (AttentionSpec(32, 512, 512), MULTISTAGE.replace(block_h=32, block_n=64, threads=256)),
        (AttentionSpec(128, 576, 2048), MULTISTAGE.replace(block_h=64, num_stages=3, threads=256)),
        (AttentionSpec(16, 576, 2048, lengths=True), TRITON),
        (AttentionSpec(16, 576, 2048, max_logits=True), TRITON),
        (AttentionSpec(128, 576, 2048, max_logits=True), SPECIALISED),
        (AttentionSpec(64, 512, 512, lengths=True, sink=True, max_logits=True), SPECIALISED),
        (AttentionSpec(5, 576, 37, max_logits=True), MULTISTAGE),
        (AttentionSpec(128, 576, 2048, sink=True), TRITON.replace(block_h=64, num_stages=5, num_warps=8)),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionSpec) else value.to_dict().get("pipeline", value.backend),
)
def test_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize("gpu", ["a100", "l40s", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("heads", [8, 32, 128])
def test_default_breaks_no_constraint(gpu, heads):
    spec = AttentionSpec(heads, 576, 2048)
    config = OP.default_config(spec, AttentionSizes(4096, 32768), resolve(gpu))
    assert not OP.violations(spec, config, resolve(gpu))


def test_default_of_many_heads_is_specialised_on_hopper():
    assert default(OP, AttentionSpec(128, 576, 2048), "tilelang") == SPECIALISED


@pytest.mark.parametrize(
    ("config", "gpu", "name"),
    [
        (SPECIALISED.replace(block_n=32), "h200", "block_n"),
        (SPECIALISED, "a100", "capability"),
        (MULTISTAGE.replace(block_h=64), "h200", "accumulator registers"),
        (MULTISTAGE.replace(threads=256), "h200", "columns per warp"),
        (MULTISTAGE.replace(block_n=64, num_stages=6), "h200", "smem"),
        (TRITON.replace(block_h=64), "h200", "accumulator registers"),
        (TRITON.replace(block_h=64, num_warps=8, num_stages=7), "l40s", "smem"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else value.backend,
)
def test_constraints_name_what_does_not_fit(config, gpu, name):
    found = OP.violations(AttentionSpec(64, 576, 2048), config, resolve(gpu))
    assert name in [violation.name for violation in found]
    assert all(violation.excess > 0 for violation in found)


def test_padding_to_more_than_twice_the_heads_is_refused():
    found = OP.violations(AttentionSpec(8, 576, 2048), TRITON.replace(block_h=32, num_warps=8), H200)
    assert [violation.name for violation in found] == ["padded heads"]


def test_is_registered_by_its_stem():
    assert ops.get("attention") is OP


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_has_a_spec(name):
    model = presets.preset(name)
    spec = OP.specs(model)[0]
    assert (spec.heads, spec.topk, spec.sink) == (model.heads, model.topk, model.attn_sink)
    assert spec.d_qk in (D_V, D_V + 64)


@pytest.mark.parametrize(("field", "value"), [("heads", 0), ("heads", 129), ("d_qk", 640), ("topk", 0), ("sink", 1)])
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        AttentionSpec.from_dict({"heads": 64, "d_qk": 576, "topk": 64, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    spec = AttentionSpec(4, 576, 8, lengths=True, sink=True)
    return list({**OP.inputs(spec, Case(AttentionSizes(3, 20), "ragged"), Draw(0)), **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 4, 576)),
        ("kv", torch.zeros(20, 1, 512, dtype=torch.bfloat16)),
        ("indices", torch.zeros(3, 1, 8, dtype=torch.int64)),
        ("indices", torch.zeros(2, 1, 8, dtype=torch.int32)),
        ("sm_scale", 0.0),
        ("sm_scale", math.nan),
        ("lengths", torch.zeros(4, dtype=torch.int32)),
        ("sink", torch.zeros(3)),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*arguments(**{argument: value}))


def test_bind_reads_the_spec_off_the_arguments():
    spec, sizes, _ = OP.bind(*arguments())
    assert (spec, sizes) == (AttentionSpec(4, 576, 8, lengths=True, sink=True), AttentionSizes(3, 20))
    assert not OP.bind(*arguments(lengths=None, sink=None))[0].sink


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
