"""Reading the paged caches back: bit for bit against the reference, round trips, what it refuses, what it compiles to."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.gather_paged import OP, GatherPagedSizes, GatherPagedSpec
from dsa_codegen.problem import caches, presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.runtime import dispatch

from support import H200, assert_compiles, assert_matches_reference

QUANTIZE = ops.get("quantize_paged")
SPECS = [
    *OP.options(OP.specs(presets.preset("deepseek-v3.2"))[0]),
    GatherPagedSpec("v4", 448, page=61),
    GatherPagedSpec("index_k", 32, page=16),
    GatherPagedSpec("index_k", 80, page=16),
    GatherPagedSpec("bf16", 208, page=1, d_rope=0),
    GatherPagedSpec("fp8_fp32_token", 176, page=20, d_rope=96),
    GatherPagedSpec("fp8_ue8m0_32", 160, d_rope=0),
    GatherPagedSpec("fp8_tensor", 64, page=16, d_rope=16),
    GatherPagedSpec("v41", 512, page=33, d_rope=0),
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


@pytest.mark.parametrize(
    ("name", "layout"),
    [("v32", caches.KvV32Layout(64)), ("v4", caches.KvV4Layout(64)), ("v4", caches.KvV4Layout(61))],
    ids=["v32", "v4", "v4-page61"],
)
def test_kv_round_trip(name, layout):
    latent = Draw(3).normal(100, layout.d_nope + layout.d_rope, dtype=torch.bfloat16)
    slots = Draw(4).permutation(2 * layout.page)[:100]
    cache = caches.as_pages(layout, layout.empty(2)).unflatten(1, (layout.page, 1, layout.bytes_per_token))
    slots[7] = -1
    dispatch.call(QUANTIZE, (latent[:, : layout.d_nope], latent[:, layout.d_nope :], slots, cache, name, False, 1.0))
    back = dispatch.call(OP, (cache, slots, name, 64, 1.0))["latent"]
    assert not back[7].any()
    keep = slots >= 0
    torch.testing.assert_close(back[keep, layout.d_nope :], latent[keep, layout.d_nope :], rtol=0, atol=0)
    torch.testing.assert_close(back[keep].float(), latent[keep].float(), rtol=2**-4, atol=0.05)


def test_index_keys_come_back_as_the_flat_form():
    layout = caches.IndexKLayout(32, 64)
    keys = Draw(5).normal(50, 64, dtype=torch.bfloat16)
    slots, cache = Draw(6).permutation(96)[:50].int(), layout.empty(3)
    dispatch.call(QUANTIZE, (keys, None, slots, cache, "index_k", False, 1.0))
    flat = dispatch.call(ops.get("quantize"), (keys, None, False))
    gathered = dispatch.call(OP, (cache, slots, "index_k", 64, 1.0))
    assert torch.equal(flat["values"].view(torch.uint8), gathered["values"].view(torch.uint8))
    assert torch.equal(flat["scales"], gathered["scales"])


def test_an_empty_cache_gives_zeros():
    outputs = dispatch.call(OP, (caches.KvV32Layout().empty(0), torch.tensor([0, 3]), "v32", 64, 1.0))
    assert not outputs["latent"].any()


@pytest.mark.parametrize("fields", [{"width": 512}, {"page": 0}, {"slots": "i16"}], ids=str)
def test_spec_refuses(fields):
    with pytest.raises(SpecError):
        GatherPagedSpec.from_dict({"layout": "index_k", "width": 128, **fields})


CACHE = caches.IndexKLayout().empty(2)
SLOTS = torch.tensor([0, 70, -1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("layout", (CACHE, SLOTS, "v5")),
        ("cache", (CACHE.float(), SLOTS, "index_k")),
        ("cache", (CACHE[..., :100], SLOTS, "index_k")),
        ("cache", (torch.tensor(0, dtype=torch.uint8), SLOTS, "index_k")),
        ("cache", (CACHE, SLOTS, "v32")),
        ("slots", (CACHE, SLOTS[:, None], "index_k")),
        ("slots", (CACHE, SLOTS.float(), "index_k")),
    ],
)
def test_call_refuses(argument, arguments):
    with pytest.raises(InputError, match=f"^{argument}"):
        dispatch.call(OP, (*arguments, 64, 1.0))


def test_nothing_to_do_launches_nothing():
    for spec in SPECS:
        inputs = OP.inputs(spec, Case(GatherPagedSizes(0)), Draw(0))
        assert OP.launches(spec, SMALL, inputs, OP.allocate(spec, inputs), H200) == ()
