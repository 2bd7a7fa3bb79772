"""Flat quantisation: bit for bit against the reference, what the numbers mean, what it refuses, what it compiles to."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.quantize import OP, QuantizeSizes, QuantizeSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.runtime import dispatch

from support import H200, assert_compiles, assert_matches_reference

SPECS = [option for spec in OP.specs(presets.preset("tiny")) for option in OP.options(spec)]
SPECS += [QuantizeSpec(80), QuantizeSpec(112), QuantizeSpec(112, 11, "bf16", power_of_two=True)]
SMALL = Config.of("triton", block_t=32, num_warps=4)
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
BF16 = torch.zeros(3, 128, dtype=torch.bfloat16)


def call(source, weights=None, power_of_two=False):
    return dispatch.call(OP, (source, weights, power_of_two))


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@BY_SPEC
def test_compiles_for_hopper(spec):
    assert_compiles(OP, spec, SMALL)


@pytest.mark.parametrize(
    "fields",
    [{"width": 100}, {"heads": 8}, {"weights": "fp32", "heads": 65}, {"weights": "fp16"}, {"power_of_two": 1}],
    ids=str,
)
def test_spec_refuses(fields):
    with pytest.raises(SpecError):
        QuantizeSpec.from_dict({"width": 128, **fields})


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("source", (BF16.float(),)),
        ("source", (BF16[:, None],)),
        ("source", (torch.zeros(3, 136, dtype=torch.bfloat16)[:, :128],)),
        ("source", (BF16, torch.zeros(3))),
        ("weights", (BF16[:, None].expand(3, 8, 128).contiguous(), torch.zeros(3, 7))),
        ("weights", (BF16[:, None].expand(3, 8, 128).contiguous(), torch.zeros(3, 8, dtype=torch.float16))),
    ],
)
def test_call_refuses(argument, arguments):
    with pytest.raises(InputError, match=f"^{argument}"):
        call(*arguments)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_zeros_have_a_finite_scale(power_of_two):
    outputs = call(torch.zeros(2, 64, dtype=torch.bfloat16), power_of_two=power_of_two)
    assert not outputs["values"].float().any()
    assert (outputs["scales"] > 0).all()
    assert outputs["scales"].isfinite().all()


def test_the_largest_magnitude_becomes_448():
    source = Draw(1).normal(50, 64, dtype=torch.bfloat16)
    assert (call(source)["values"].float().abs().amax(-1) == 448).all()
    scales = call(source, power_of_two=True)["scales"]
    assert torch.equal(scales, torch.exp2(torch.log2(scales).round()))


def test_folded_weights_undo_the_scale_of_the_queries():
    q, weights = Draw(7).normal(5, 8, 64, dtype=torch.bfloat16), Draw(8).normal(5, 8, dtype=torch.bfloat16)
    outputs = call(q, weights)
    restored = outputs["values"].float() * outputs["folded"][..., None]
    torch.testing.assert_close(restored, q.float() * weights.float()[..., None] * 512**-0.5, rtol=2**-4, atol=1e-3)


@BY_SPEC
def test_nothing_to_do_launches_nothing(spec):
    inputs = OP.inputs(spec, Case(QuantizeSizes(0)), Draw(0))
    assert OP.launches(spec, SMALL, inputs, OP.allocate(spec, inputs), H200) == ()
