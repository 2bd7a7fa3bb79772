"""Sparse decode over the FP8 caches: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.caches import KvV4Layout, KvV32Layout, as_pages
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import FURTHER, H200, assert_compiles, assert_matches_reference, completed, default

SPECS = [
    AttentionPagedSpec(16, 64),
    AttentionPagedSpec(5, 45, page=7, lengths=True, sink=True),
    AttentionPagedSpec(33, 33, sink=True),
    AttentionPagedSpec(20, 70, kv_layout="v4", page=53, lengths=True, sink=True),
    AttentionPagedSpec(1, 17, kv_layout="v4", page=2),
]
# Rows of any channels, as they are or with scales of every kind.
ROWS = [
    AttentionPagedSpec(4, 50, kv_layout="bf16", page=1, lengths=True),
    AttentionPagedSpec(20, 37, kv_layout="bf16", d_v=128, d_rope=32, sink=True),
    AttentionPagedSpec(9, 41, kv_layout="fp8_fp32_64", page=20, d_v=192, d_rope=48, lengths=True),
    AttentionPagedSpec(5, 30, kv_layout="fp8_ue8m0_32", d_v=208, d_rope=48, rope_in_value=True),
    AttentionPagedSpec(3, 30, kv_layout="fp8_tensor", d_v=80, d_rope=0),
    AttentionPagedSpec(8, 30, kv_layout="v41", d_rope=0, page=33, sink=True, extra_topk=20, extra_page=5),
]
# The second pool: V4's, another page and other lengths than the first's, none of them a multiple of a tile.
TWO_POOLS = [
    AttentionPagedSpec(
        5, 20, kv_layout="v4", page=61, lengths=True, sink=True, extra_topk=45, extra_page=2, extra_lengths=True
    ),
    AttentionPagedSpec(16, 33, kv_layout="v4", page=53, extra_topk=16, extra_page=64),
    AttentionPagedSpec(20, 7, page=69, sink=True, extra_topk=30, extra_page=7, extra_lengths=True),
]
SMALL = Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="bits", splits=3)
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.id)
def test_rows_of_any_channels_match_the_reference(interpreter, spec):
    assert_matches_reference(interpreter, OP, spec, SMALL, Case(AttentionPagedSizes(2, 1, 100), "ragged"))


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("spec", TWO_POOLS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_two_pools_match_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("changes", [{"splits": 1}, {"splits": 24}, {"block_n": 32}], ids=str)
def test_two_pools_match_the_reference_in_every_form(interpreter, changes):
    case = OP.cases(TWO_POOLS[0])[1]
    assert_matches_reference(interpreter, OP, TWO_POOLS[0], SMALL.replace(**changes), case, repeats=2)


@pytest.mark.parametrize("changes", [{"splits": 1}, {"splits": 24}, {"dequantize": "cast"}, {"block_n": 32}], ids=str)
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[4]], ids=lambda spec: spec.id)
def test_every_form_matches_the_reference(interpreter, spec, changes):
    assert_matches_reference(interpreter, OP, spec, SMALL.replace(**changes), OP.cases(spec)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in presets.names() if OP.specs(presets.preset(name))])
def test_default_config_compiles_for_hopper(name):
    spec = OP.specs(presets.preset(name))[0]
    assert_compiles(OP, spec, default(OP, spec, "triton"), spills=96)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"block_h": 16, "block_n": 64, "num_warps": 8}, marks=FURTHER),
        {"block_h": 32, "block_n": 32},
        pytest.param({"block_h": 64, "block_n": 32, "num_warps": 8, "num_stages": 3}, marks=FURTHER),
        {"block_h": 64, "block_n": 64, "num_warps": 8, "dequantize": "cast"},
    ],
    ids=str,
)
def test_configs_without_violations_fit(changes):
    assert_compiles(OP, AttentionPagedSpec(128, 2048, sink=True), SMALL.replace(**changes), spills=128)


def test_rotary_channels_within_the_value_of_any_rows_compile():
    """The interpreter let two types of one name pass; the compiler does not."""
    spec = next(spec for spec in ROWS if spec.rope_in_value)
    assert_compiles(OP, spec, SMALL, spills=96)


@pytest.mark.parametrize("heads", [8, *(pytest.param(heads, marks=FURTHER) for heads in (16, 64)), 128])
def test_two_pools_compile_for_hopper(heads):
    spec = AttentionPagedSpec(heads, 128, "v4", 256, sink=True, extra_topk=512, extra_page=64, extra_lengths=True)
    assert_compiles(OP, spec, default(OP, spec, "triton"), spills=64)


@pytest.mark.parametrize("spec", [*SPECS[1::2], TWO_POOLS[0]], ids=lambda spec: spec.id)
def test_the_specialised_kernel_compiles_for_hopper(spec):
    assert_compiles(OP, spec, Config.of("gluon", splits=1))


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
        OP.bind(*completed(OP, *arguments(**{argument: value})))


@pytest.mark.parametrize("spec", SPECS[1::2], ids=lambda spec: spec.id)
def test_bind_names_what_it_took(spec):
    pages = as_pages(spec.layout, spec.layout.empty(2)).unflatten(1, (spec.page, 1, spec.layout.bytes_per_token))
    bound, sizes, inputs = OP.bind(*completed(OP, *arguments(spec, cache=pages)))
    assert bound == spec
    assert (sizes.batch, sizes.next_n) == (2, 2)
    pools = [f"{pool}{name}" for pool in ("", "extra_") for name in ("cache", "indices", "lengths")]
    assert inputs.keys() == {"q", "sm_scale", "sink", *pools}


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
    spec, _, _ = OP.bind(*completed(OP, *arguments(AttentionPagedSpec(4, 8, kv_layout="v4", page=61), cache=view)))
    assert spec.page == 61


@pytest.mark.parametrize("spec", TWO_POOLS, ids=lambda spec: spec.id)
def test_one_softmax_runs_over_both_pools(spec):
    """Two calls, one for each pool, joined by their lse, give what one call over both gives."""
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(2, 3, 150), "ragged"), Draw(3))
    both = OP.reference(spec, inputs)
    parts = []
    for prefix in ("", "extra_"):
        pool = {name: inputs[f"{prefix}{name}"] for name in ("cache", "indices", "lengths")}
        fields = {name: getattr(spec, f"{prefix}{name}") for name in ("topk", "page", "lengths")}
        alone = AttentionPagedSpec(spec.heads, kv_layout=spec.kv_layout, **fields)
        parts.append(OP.reference(alone, {**inputs, **pool, "sink": None}))
    lse = torch.stack([part["lse"] for part in parts])
    joined = lse.logsumexp(0)
    total = joined if inputs["sink"] is None else torch.logaddexp(joined, inputs["sink"])
    shares = (lse - total).exp().nan_to_num(0.0)
    torch.testing.assert_close(both["lse"], joined)
    torch.testing.assert_close(both["out"], (torch.stack([part["out"] for part in parts]) * shares[..., None]).sum(0))


def test_an_empty_second_pool_changes_nothing():
    spec = TWO_POOLS[1]
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(2, 1, 150), "random"), Draw(4))
    nothing = {"extra_cache": spec.extra_layout.empty(0), "extra_indices": torch.full_like(inputs["extra_indices"], -1)}
    alone = OP.reference(AttentionPagedSpec(spec.heads, spec.topk, "v4", spec.page), inputs)
    for name, value in OP.reference(spec, {**inputs, **nothing}).items():
        assert torch.equal(value, alone[name])


def two_pools(**changes):
    """A valid call's arguments in order, its caches as engines view them, with some of them changed."""
    spec = TWO_POOLS[0]
    layouts = {"cache": spec.layout, "extra_cache": spec.extra_layout}
    pages = {name: as_pages(each, each.empty(3)).unflatten(1, (each.page, 1, 584)) for name, each in layouts.items()}
    return arguments(spec, **{**pages, **changes})


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"extra_cache": None}, "extra_indices"),
        ({"extra_cache": None, "extra_indices": None}, "extra_lengths"),
        ({"extra_cache": torch.zeros(10, 7, 1, 656, dtype=torch.uint8)}, "extra_cache"),
        ({"extra_indices": None}, "extra_indices"),
        ({"extra_indices": torch.zeros(2, 1, 45, dtype=torch.int32)}, "extra_indices"),
        ({"extra_lengths": torch.zeros(3, dtype=torch.int32)}, "extra_lengths"),
    ],
    ids=str,
)
def test_a_wrong_second_pool_is_named(changes, argument):
    with pytest.raises(InputError, match=f"^{argument}:"):
        OP.bind(*completed(OP, *two_pools(**changes)))


def test_spec_of_a_second_pool_has_one_spelling():
    with pytest.raises(SpecError, match="extra_lengths"):
        AttentionPagedSpec(16, 64, extra_lengths=True)
    assert OP.bind(*completed(OP, *two_pools()))[0] == TWO_POOLS[0]
