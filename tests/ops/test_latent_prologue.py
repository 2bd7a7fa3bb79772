"""The latent's prologue: against the reference and the functions that it joins, what it refuses, what it compiles to."""

from __future__ import annotations

import math

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.latent_prologue import OP, LatentPrologueSizes, LatentPrologueSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.kv_layouts import kv_layout
from dsa_codegen.problem.op import Case, Config

from support import H200, arguments, assert_compiles, assert_matches_reference, run_interpreted

V32, V4 = (OP.specs(presets.preset(name))[0] for name in ("tiny", "deepseek-v4-flash"))
SPECS = [*OP.options(V32), V4, OP.options(V4)[1], LatentPrologueSpec("bf16", 448, "half_split", "latent", page=61)]
SPECS += [
    LatentPrologueSpec("fp8_ue8m0_64", 192, "half_split", "latent", power_of_two=True, d_rope=96),
    LatentPrologueSpec("fp8_tensor", 80, norm="nope", d_rope=0),
    LatentPrologueSpec("fp8_fp32_token", 144, d_rope=32),
]

SMALL = Config.of("triton", block_t=4, num_warps=4)


@pytest.mark.parametrize("case", OP.cases(V32)[1:], ids=lambda case: case.id)
def test_matches_the_reference(interpreter, case):
    assert_matches_reference(interpreter, OP, V32, SMALL, case)


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda spec: spec.id)
def test_matches_the_reference_with_options(interpreter, spec):
    assert_matches_reference(interpreter, OP, spec, SMALL, Case(LatentPrologueSizes(7), "repeated"))


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[-1]], ids=lambda spec: spec.id)
def test_compiles_for_hopper(spec):
    assert_compiles(OP, spec, SMALL)


@pytest.mark.parametrize(
    "fields",
    [{"layout": "index_k"}, {"width": 448}, {"rotary": "none"}, {"norm": "all"}, {"layout": "bf16", "power_of_two": True}],
    ids=str,
)
def test_spec_refuses(fields):
    with pytest.raises((SpecError, KeyError)):
        LatentPrologueSpec.from_dict({"layout": "v32", "width": 512, **fields})


def drawn(spec=V32, tokens=5):
    return OP.inputs(spec, Case(LatentPrologueSizes(tokens)), Draw(4))


def call(inputs, **options):
    named = {name: value for name, value in inputs.items() if name != "eps"}
    return dsa.store_latent(*named.values(), **options)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("latent", {"latent": torch.zeros(5, 576)}),
        ("latent", {"latent": torch.zeros(5, 512, dtype=torch.bfloat16)}),
        ("norm_weight", {"norm_weight": torch.zeros(64)}),
        ("cos_sin", {"cos_sin": torch.zeros(9, 32)}),
        ("positions", {"positions": torch.zeros(4, dtype=torch.int64)}),
        ("slots", {"slots": torch.zeros(5)}),
        ("cache", {"cache": torch.zeros(2, 64, 1, 576, dtype=torch.bfloat16)}),
    ],
)
def test_call_refuses(argument, change):
    with pytest.raises(InputError, match=f"^{argument}"):
        call({**drawn(), **change})


@pytest.mark.parametrize(("argument", "option"), [("layout", {"layout": "v5"}), ("rotary", {"rotary": "half"})])
def test_call_refuses_options(argument, option):
    with pytest.raises(InputError, match=f"^{argument}"):
        call(drawn(), **option)


def test_a_plain_cache_is_checked_too():
    plain = drawn(LatentPrologueSpec("bf16", 512))
    for cache in (plain["cache"].float(), plain["cache"][..., :512], plain["cache"].transpose(0, 1)):
        with pytest.raises(InputError, match=r"^cache"):
            call({**plain, "cache": cache}, layout="bf16")


@pytest.mark.parametrize("layout", ["v32", "v4"])
def test_without_norm_and_position_it_is_store_kv(layout):
    spec = V32 if layout == "v32" else V4
    inputs = {**drawn(spec, 9), "norm_weight": None}
    inputs["positions"] = torch.zeros_like(inputs["positions"])
    call(inputs, layout=layout)
    nope, rope = inputs["latent"].split((spec.width, 64), 1)
    expected = torch.zeros_like(inputs["cache"])
    dsa.store_kv(nope, rope, inputs["slots"], expected, layout=layout)
    assert torch.equal(inputs["cache"], expected)


def test_a_plain_cache_holds_the_rows():
    inputs = drawn(LatentPrologueSpec("bf16", 512, norm="nope"), 9)
    inputs["slots"] = torch.arange(9)
    call(inputs, layout="bf16")
    rows, latent = inputs["cache"].flatten(0, 1)[:9, 0].float(), inputs["latent"].float()
    expected = torch.nn.functional.rms_norm(latent[:, :512], (512,), inputs["norm_weight"], 1e-6)
    torch.testing.assert_close(rows[:, :512], expected, rtol=2**-8, atol=1e-6)
    pairs = torch.view_as_complex(latent[:, 512:].unflatten(1, (32, 2)).contiguous())
    cos, sin = inputs["cos_sin"][inputs["positions"]].chunk(2, 1)
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(1)
    torch.testing.assert_close(rows[:, 512:], turned, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("spec", [V32, V4, SPECS[2]], ids=lambda spec: spec.id)
def test_what_is_not_a_number_stays_visible(interpreter, spec):
    inputs = drawn(spec, 4)
    inputs["slots"] = torch.arange(4)
    inputs["latent"][1, 3] = math.nan
    inputs["positions"][2] = -1
    interpreted = run_interpreted(interpreter, OP.name, spec, SMALL, inputs)
    call(inputs, layout=spec.layout)
    for cache in (inputs["cache"], interpreted["cache"]):
        if spec.layout == "bf16":
            rows = cache.flatten(0, 1)[:4, 0].float()
        else:
            rows = kv_layout(spec.layout).dequantize(cache, inputs["slots"])
        assert rows[[0, 3]].isfinite().all()
        assert rows[1, : spec.normalised or 1].isnan().all() or spec.norm == "none"
        assert rows[1, 3].isnan()
        assert rows[2, -64:].isnan().all()
        assert rows[2, :-64].isfinite().all()


def test_a_wrong_result_is_seen():
    for spec in (V32, V4, SPECS[2]):
        inputs = drawn(spec, 20)
        inputs["slots"] = torch.arange(20)
        right = OP.reference(spec, inputs)
        assert OP.check(spec, inputs, right, right).passed
        for block, place in ((0, 1), (0, 513), (-1, 7)):
            wrong = right["cache"].clone()
            wrong[block].view(torch.uint8).view(-1)[place] ^= 0x40
            assert not OP.check(spec, inputs, {"cache": wrong}, right).passed


def test_launches_one_kernel_and_claims_where_there_are_many():
    for tokens, kernels in ((0, []), (4096, ["latent_prologue"]), (4097, ["claim", "claim", "latent_prologue"])):
        inputs = OP.inputs(V32, Case(LatentPrologueSizes(tokens)), Draw(0, "meta"))
        launches = OP.launches(V32, SMALL, inputs, OP.allocate(V32, inputs), H200)
        assert [launch.kernel for launch in launches] == kernels


def test_arguments_of_the_operator_are_those_of_the_inputs():
    inputs = drawn()
    spec, sizes, bound = OP.bind(*arguments(OP, V32, inputs))
    assert (spec, sizes) == (V32, LatentPrologueSizes(5))
    assert bound.keys() == inputs.keys()
