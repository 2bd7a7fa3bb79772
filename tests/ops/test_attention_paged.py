"""Sparse decode over the FP8 caches: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.caches import KvV4Layout, KvV32Layout, as_pages
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import H200, assert_compiles, assert_matches_reference, default

SPECS = [
    AttentionPagedSpec(16, 64),
    AttentionPagedSpec(5, 45, page=7, lengths=True, sink=True),
    AttentionPagedSpec(33, 33, sink=True),
    AttentionPagedSpec(20, 70, kv_layout="v4", page=53, lengths=True, sink=True),
    AttentionPagedSpec(1, 17, kv_layout="v4", page=2),
]
SMALL = Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="bits", splits=3)
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("changes", [{"splits": 1}, {"splits": 24}, {"dequantize": "cast"}, {"block_n": 32}], ids=str)
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[4]], ids=lambda spec: spec.id)
def test_every_form_matches_the_reference(interpreter, spec, changes):
    assert_matches_reference(interpreter, OP, spec, SMALL.replace(**changes), OP.cases(spec)[1])


@pytest.mark.parametrize("name", presets.names())
def test_default_config_compiles_for_hopper(name):
    spec = OP.specs(presets.preset(name))[0]
    assert_compiles(OP, spec, default(OP, spec, "triton"), spills=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_h": 16, "block_n": 64, "num_warps": 8},
        {"block_h": 32, "block_n": 32},
        {"block_h": 64, "block_n": 32, "num_warps": 8, "num_stages": 3},
        {"block_h": 64, "block_n": 64, "num_warps": 8, "dequantize": "cast"},
    ],
    ids=str,
)
def test_configs_without_violations_fit(changes):
    assert_compiles(OP, AttentionPagedSpec(128, 2048, sink=True), SMALL.replace(**changes), spills=64)


@pytest.mark.parametrize("spec", SPECS[1::2], ids=lambda spec: spec.id)
def test_the_specialised_kernel_compiles_for_hopper(spec):
    # 8 bytes: the base of shared memory, which a producer reads once per tile.
    assert_compiles(OP, spec, Config.of("gluon", splits=1), spills=8)


@BY_SPEC
@pytest.mark.parametrize("sizes", [case.sizes for case in OP.workloads(SPECS[0])], ids=lambda sizes: sizes.id)
def test_default_config_fits_every_gpu(spec, sizes):
    for name in ("a100", "l40s", "h100", "h20", "b200", "rtx5090"):
        gpu = resolve(name)
        assert not OP.violations(spec, OP.default_config(spec, sizes, gpu), gpu)


def test_more_blocks_share_a_row_when_rows_are_few():
    spec = AttentionPagedSpec(128, 2048)
    found = [OP.default_config(spec, AttentionPagedSizes(batch, 1, 1 << 20), H200, "triton") for batch in (1, 8, 64)]
    splits = [config["splits"] for config in found]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] >= 16
    assert splits[-1] == 1


def test_is_registered_by_its_stem():
    assert ops.get("attention_paged") is OP


def test_serves_the_models_whose_latents_a_cache_can_hold():
    v4 = OP.specs(presets.preset("deepseek-v4-pro"))[0]
    assert (v4.kv_layout, v4.heads, v4.topk, v4.sink) == ("v4", 128, 1024, True)


def test_a_row_without_a_token_is_zero():
    inputs = OP.inputs(SPECS[0], Case(AttentionPagedSizes(1, 1, 64), "ragged"), Draw(0))
    outputs = OP.reference(SPECS[0], inputs)
    assert not outputs["out"].any()
    assert (outputs["lse"] == -math.inf).all()


@pytest.mark.parametrize("layout", [KvV32Layout(5), KvV4Layout(5)], ids=lambda layout: layout.name)
def test_equals_dense_attention_over_the_latents_read_back(layout):
    spec = AttentionPagedSpec(3, 20, kv_layout=layout.name, page=5)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(1, 1, 20), "random"), Draw(1))
    latent = layout.dequantize(inputs["cache"], torch.arange(20)).bfloat16().float()
    weights = (inputs["q"][0, 0].float() @ latent.T * inputs["sm_scale"]).softmax(-1)
    torch.testing.assert_close(OP.reference(spec, inputs)["out"][0, 0], weights @ latent[:, :512], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("heads", 129), ("topk", 0), ("kv_layout", "v3"), ("page", 0), ("sink", 1)])
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        AttentionPagedSpec.from_dict({"heads": 64, "topk": 2048, field: value})


def arguments(spec=SPECS[1], **changes):
    """A valid call's arguments in order, with some of them changed."""
    return list({**OP.inputs(spec, Case(AttentionPagedSizes(2, 2, 70), "ragged"), Draw(0)), **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(2, 2, 5, 576)),
        ("q", torch.zeros(2, 2, 5, 192, dtype=torch.bfloat16)),
        ("cache", torch.zeros(10, 7, 1, 584, dtype=torch.uint8)),
        ("cache", torch.zeros(10, 7, 1, 656, dtype=torch.int8)),
        ("indices", torch.zeros(2, 2, 45, dtype=torch.int64)),
        ("indices", torch.zeros(2, 3, 45, dtype=torch.int32)),
        ("sm_scale", -1.0),
        ("sm_scale", math.nan),
        ("lengths", torch.zeros(3, dtype=torch.int32)),
        ("lengths", torch.zeros(2, 3, dtype=torch.int32)),
        ("sink", torch.zeros(5, dtype=torch.float64)),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*arguments(**{argument: value}))


@pytest.mark.parametrize("spec", SPECS[1::2], ids=lambda spec: spec.id)
def test_bind_names_what_it_took(spec):
    pages = as_pages(spec.layout, spec.layout.empty(2)).unflatten(1, (spec.page, 1, spec.layout.bytes_per_token))
    bound, sizes, inputs = OP.bind(*arguments(spec, cache=pages))
    assert bound == spec
    assert (sizes.batch, sizes.next_n) == (2, 2)
    assert list(inputs) == ["q", "cache", "indices", "sm_scale", "lengths", "sink"]


def test_a_long_prompt_is_not_split_until_memory_ends():
    """Splits are tuned for a query or two per sequence; with 4096 of 128 heads each, 32 parts would take 34 GB."""
    spec = AttentionPagedSpec(128, 2048)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(1, 4096, 4096), "random"), Draw(0, "meta"))
    config = Config.of("gluon", splits=32)
    (launch,) = OP.launches(spec, config, inputs, OP.allocate(spec, inputs), H200)
    assert launch.grid == (4096 * 2, 1, 1)
    inputs = {**inputs, "q": inputs["q"][:, :2]}
    main, combine = OP.launches(spec, config, inputs, OP.allocate(spec, inputs), H200)
    assert (main.grid[0], combine.args[-2:]) == (2 * 2 * 32, (32, 0))


@pytest.mark.parametrize(
    ("rows", "heads", "programs", "joined"),
    [
        (1, 128, 2 * 16, 128),  # few blocks: all are split
        (64, 128, 128, 0),  # a wave
        (148, 128, 264 + 32 * 4, 32 * 64),  # two waves, and the rest of the blocks in a third that is full as well
        (141, 16, 132 + 9 * 12, 9 * 16),
        (4096, 128, 8184 + 8 * 8, 8 * 64),
    ],
)
def test_blocks_beyond_whole_waves_are_split(rows, heads, programs, joined):
    spec = AttentionPagedSpec(heads, 2048)
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(rows, 1, 4096), "random"), Draw(0, "meta"))
    main, *combine = OP.launches(spec, Config.of("gluon", splits=0), inputs, OP.allocate(spec, inputs), H200)
    assert main.grid[0] == programs
    assert sum(launch.grid[0] for launch in combine) == joined


def test_takes_the_v4_cache_as_engines_view_it():
    layout = KvV4Layout(61)
    pages = layout.empty(3)
    view = pages.as_strided((3, 61, 1, 584), (layout.page_bytes, 584, 584, 1))
    spec, _, _ = OP.bind(*arguments(AttentionPagedSpec(4, 8, kv_layout="v4", page=61), cache=view))
    assert spec.page == 61
