"""Quantising into the paged caches: byte for byte against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.quantize_paged import OP, QuantizePagedSizes, QuantizePagedSpec
from dsa_codegen.problem import caches, presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import interpret
from dsa_codegen.runtime import dispatch

from support import H200, assert_compiles, assert_matches_reference

SPECS = [
    *OP.options(OP.specs(presets.preset("deepseek-v3.2"))[0]),
    OP.specs(presets.preset("deepseek-v4-pro"))[0],
    QuantizePagedSpec("v4", 448, page=61, power_of_two=True),
    QuantizePagedSpec("index_k", 32, page=16),
    QuantizePagedSpec("index_k", 80, page=16),
    QuantizePagedSpec("bf16", 208, page=1, d_rope=48),
    QuantizePagedSpec("fp8_fp32_token", 176, page=20, d_rope=96),
    QuantizePagedSpec("fp8_ue8m0_32", 160, d_rope=0, power_of_two=True),
    QuantizePagedSpec("fp8_tensor", 64, page=16, d_rope=16),
    QuantizePagedSpec("v41", 512, page=33, d_rope=0, power_of_two=True),
]
SMALL = Config.of("triton", block_t=8, num_warps=4)
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@BY_SPEC
def test_compiles_for_hopper(spec):
    assert_compiles(OP, spec, SMALL)


@BY_SPEC
def test_a_stray_write_is_seen(spec):
    inputs = OP.inputs(spec, Case(QuantizePagedSizes(20)), Draw(2))
    inputs["cache"].fill_(7)
    inputs["cache"].copy_(OP.reference(spec, inputs)["cache"])
    assert OP.check(spec, inputs, {"cache": inputs["cache"]}, {}).passed
    inputs["cache"][-1].view(-1)[3] = 8
    assert not OP.check(spec, inputs, {"cache": inputs["cache"]}, {}).passed


@pytest.mark.parametrize(
    "fields",
    [{"layout": "v5"}, {"width": 512}, {"layout": "v4", "width": 448}, {"page": 0}, {"slots": "i16"}, {"power_of_two": 1}],
    ids=str,
)
def test_spec_refuses(fields):
    with pytest.raises((SpecError, KeyError)):
        QuantizePagedSpec.from_dict({"layout": "index_k", "width": 128, **fields})


KV = torch.zeros(3, 576, dtype=torch.bfloat16)
NOPE, ROPE = KV[:, :512], KV[:, 512:]
SLOTS = torch.tensor([0, 70, -1], dtype=torch.int32)
V32 = caches.KvV32Layout().empty(2)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("layout", (NOPE, ROPE, SLOTS, V32, "v5")),
        ("source", (NOPE.float(), ROPE, SLOTS, V32, "v32")),
        ("source", (NOPE, ROPE, SLOTS, V32, "v4")),
        ("source", (NOPE, None, SLOTS, V32, "index_k")),
        ("rope", (NOPE, None, SLOTS, V32, "v32")),
        ("rope", (NOPE, ROPE[:, :32], SLOTS, V32, "v32")),
        ("rope", (NOPE[:, :128], ROPE, SLOTS, V32, "index_k")),
        ("slots", (NOPE, ROPE, SLOTS.short(), V32, "v32")),
        ("slots", (NOPE, ROPE, SLOTS[:2], V32, "v32")),
        ("cache", (NOPE, ROPE, SLOTS, V32[..., :640], "v32")),
        ("cache", (NOPE, ROPE, SLOTS, V32.float(), "v32")),
    ],
)
def test_call_refuses(argument, arguments):
    with pytest.raises(InputError, match=f"^{argument}"):
        dispatch.call(OP, (*arguments, False, 1.0))


def test_nothing_to_do_launches_nothing():
    for spec in SPECS:
        inputs = OP.inputs(spec, Case(QuantizePagedSizes(0)), Draw(0))
        assert OP.launches(spec, SMALL, inputs, OP.allocate(spec, inputs), H200) == ()


def interpret_repeated(layout, width, tokens):
    """Whether the kernels leave what the reference does, whole, where many rows share slots."""
    spec = QuantizePagedSpec(layout, width, page=16)
    return interpret(
        "quantize_paged", spec, Config.of("triton", block_t=64, num_warps=8), Case(QuantizePagedSizes(tokens), "repeated"), H200
    )


@pytest.mark.parametrize(("layout", "width", "tokens"), [("index_k", 32, 1100), ("v32", 512, 70)])
def test_of_rows_with_one_slot_the_last_is_stored(interpreter, layout, width, tokens):
    accuracy = interpreter.call(interpret_repeated, layout, width, tokens)
    assert accuracy.passed, accuracy.detail


@pytest.mark.parametrize("tokens", [500, 3500])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_last_row_of_a_slot_is_stored_whole(device, tokens):
    """Few rows are compared with each other, many claim their slots first; latents and keys alike, and in every run."""
    draw = Draw(3, device)
    rows, slots = draw.normal(tokens, 576, dtype=torch.bfloat16), draw.integers(0, 60, tokens)
    last = torch.tensor([int((slots == slot).nonzero()[-1]) for slot in slots.unique()], device=device)
    kv, keys = caches.KvV32Layout(64), caches.IndexKLayout(64, 128)
    alone = kv.empty(1, device), keys.empty(1, device)
    dsa.store_kv(rows[last, :512].contiguous(), rows[last, 512:].contiguous(), slots[last], alone[0])
    dsa.store_index_k(rows[last, :128].contiguous(), slots[last], alone[1])
    for _ in range(3):
        cache = kv.empty(1, device), keys.empty(1, device)
        dsa.store_kv(rows[:, :512], rows[:, 512:], slots, cache[0])
        dsa.store_index_k(rows[:, :128].contiguous(), slots, cache[1])
        assert all(map(torch.equal, cache, alone))


def test_many_rows_are_claimed_first():
    spec = QuantizePagedSpec("v32", 512)
    inputs = OP.inputs(spec, Case(QuantizePagedSizes(1025)), Draw(0, "meta"))
    launches = OP.launches(spec, SMALL, inputs, OP.allocate(spec, inputs), H200)
    assert [launch.kernel for launch in launches] == ["claim", "claim", "quantize_paged"]
    assert launches[0].args[1].numel() == len(inputs["cache"]) * 64
    assert launches[2].args[-1] == 1
