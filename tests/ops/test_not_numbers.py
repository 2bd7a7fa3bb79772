"""NaN and infinities: a broken row stays visible in its own results, and touches no other."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import AttentionSpec
from dsa_codegen.ops.attention_paged import AttentionPagedSpec
from dsa_codegen.ops.indexer import IndexerSpec
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.ops.quantize import QuantizeSpec
from dsa_codegen.problem.caches import IndexKLayout, KvV32Layout, as_pages
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.kv_layouts import ROW_SCALES, kv_layout
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.runtime import dispatch

import emulator
from support import FURTHER, H200, run_interpreted

FP8 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCORES = ["weighted_relu", "relu_bias"]
INDEXERS = {
    "gluon": Config.of("gluon", accumulators=1, block_n=64, num_stages=2, blocks_per_sm=2, edges=False, unrolled=False),
    "triton": Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=1),
    "tilelang": Config.of(
        "tilelang", block_q=2, block_n=64, num_stages=2, splits=1, pipeline="plain", threads=128, blocks_per_sm=1
    ),
}
PAGED_INDEXERS = {
    "gluon": Config.of("gluon", part_queries=1, block_n=64, num_stages=2, accumulators=1, blocks_per_sm=2, gathered=1),
    "triton": Config.of("triton", schedule="split", block_n=64, block_q=1, num_warps=4, num_stages=2, blocks_per_sm=1),
}
PREFILL = {
    "tilelang": Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384),
    "multistage": Config.of("tilelang", pipeline="multistage", block_h=32, block_n=64, num_stages=2, threads=256),
    "triton": Config.of("triton", block_h=16, block_n=32, num_stages=2, num_warps=4),
    "cuda": Config.of(
        "cuda", num_stages=7, turns=False, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=168
    ),
}
DECODE = {
    "gluon": Config.of("gluon", splits=1),
    "split": Config.of("gluon", splits=2),
    "cuda": Config.of("cuda", splits=1, sharers=0, columns=0, head_rounds=0, flat=False, interleave=False, sweep=False),
    "cuda split": Config.of("cuda", splits=2, sharers=0, columns=0, head_rounds=0, flat=False, interleave=False, sweep=False),
    "cuda sharers": Config.of("cuda", splits=0, sharers=4, columns=0, head_rounds=0, flat=False, interleave=False, sweep=False),
    "cuda columns": Config.of(
        "cuda", splits=0, sharers=4, columns=16, head_rounds=0, flat=False, interleave=False, sweep=False
    ),
    "cuda rounds": Config.of("cuda", splits=0, sharers=0, columns=0, head_rounds=1, flat=False, interleave=False, sweep=False),
    "cuda flat": Config.of("cuda", splits=0, sharers=0, columns=0, head_rounds=0, flat=True, interleave=False, sweep=False),
    "bits": Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="bits", splits=1),
    "cast": Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="cast", splits=2),
}


def under(device, op, config):
    """The kernels of this config on a GPU; on the CPU there is one way only."""
    return dispatch.override(ops.get(op), config) if device == "cuda" else contextlib.nullcontext()


def indexer_inputs(device="cpu"):
    draw = Draw(5, device)
    k, k_scale = draw.normal(200, 64, dtype=FP8), draw.uniform(200, low=0.5)
    k[7, 3] = math.nan
    k_scale[11] = math.nan
    q, weights = draw.normal(3, 8, 64, dtype=FP8), draw.normal(3, 8)
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    return {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": starts + 200}


def assert_nan_at(logits, columns):
    where = logits.isnan().nonzero()[:, 1].unique().tolist()
    assert where == columns
    assert logits.isnan().sum() == len(logits) * len(columns)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", INDEXERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_scores_nan(device, backend, score):
    with under(device, "indexer", INDEXERS[backend]):
        assert_nan_at(dsa.indexer_logits(*indexer_inputs(device).values(), score=score), [7, 11])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_that_nobody_quantised_scores_nan(device, score):
    inputs = indexer_inputs(device)
    q, k = (inputs[name].float().bfloat16() for name in ("q", "k"))
    rest = list(inputs.values())[3:]
    assert_nan_at(dsa.indexer_logits(q, k, None, *rest, score=score, scores="bf16"), [7])


@pytest.mark.parametrize("score", SCORES)
def test_a_broken_key_scores_nan_interpreted(interpreter, score):
    spec = IndexerSpec(8, 64, score=score)
    outputs = run_interpreted(interpreter, "indexer", spec, INDEXERS["triton"], indexer_inputs())
    assert_nan_at(outputs["logits"], [7, 11])


def paged_indexer_inputs(score, device="cpu"):
    op = ops.get("indexer_paged")
    spec = IndexerPagedSpec(8, 64, score=score)
    inputs = op.inputs(spec, Case(IndexerPagedSizes(1, 150), "full"), Draw(6, device))
    slot = int(inputs["page_table"][0, 0]) * 64
    layout, slots = IndexKLayout(64, 64), torch.tensor([slot + 7, slot + 11], device=device)
    keys, scales = layout.unpack(inputs["cache"], slots)
    keys[0, 3], scales[1] = math.nan, math.nan
    layout.pack(inputs["cache"], slots, keys, scales)
    return spec, inputs


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", PAGED_INDEXERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_of_a_cache_scores_nan(device, backend, score):
    _, inputs = paged_indexer_inputs(score, device)
    with under(device, "indexer_paged", PAGED_INDEXERS[backend]):
        assert_nan_at(dsa.indexer_logits_paged(*inputs.values(), score=score), [7, 11])


@pytest.mark.parametrize("score", SCORES)
def test_a_broken_key_of_a_cache_scores_nan_interpreted(interpreter, score):
    spec, inputs = paged_indexer_inputs(score)
    outputs = run_interpreted(interpreter, "indexer_paged", spec, PAGED_INDEXERS["triton"], inputs)
    assert_nan_at(outputs["logits"], [7, 11])


@pytest.mark.parametrize("op", ["indexer", "indexer_paged"])
@pytest.mark.parametrize("score", SCORES)
def test_every_relu_of_an_indexer_keeps_nan(op, score):
    spec = IndexerSpec(8, 64, score=score) if op == "indexer" else IndexerPagedSpec(8, 64, score=score)
    for config in (INDEXERS if op == "indexer" else PAGED_INDEXERS).values():
        code = render(ops.get(op), spec, config).code
        assert code.count("PropagateNan.ALL") + code.count("max.NaN.f32") == 1
        assert "T.max(terms" not in code


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_token_is_chosen_last(device):
    scores = torch.arange(100.0, device=device).expand(2, 100).contiguous()
    scores[:, 50:90] = math.nan
    chosen = dsa.select(scores, torch.full((2,), 100, dtype=torch.int32, device=device), 64)
    assert chosen[0].tolist() == [*range(50), 50, 51, 52, 53, *range(90, 100)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_broken_row_is_quantised_to_nan_alone(device, power_of_two):
    exact = Draw(1).normal(9, 128, dtype=torch.bfloat16).to(device)
    exact[2, 5], exact[4, 0], exact[6, 127] = math.nan, math.inf, -math.inf
    values, scales = dsa.quantize_index_k(exact, power_of_two=power_of_two)
    latent = values.float() * scales[:, None]
    assert latent[[2, 4, 6]].isnan().all()
    kept = [0, 1, 3, 5, 7, 8]
    torch.testing.assert_close(latent[kept], exact[kept].float(), rtol=0.07, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_query_and_a_broken_latent_are_quantised_to_nan_alone(device):
    """A row of queries is one head of one token; the scale of a query is in its weight."""
    exact = Draw(1).normal(5, 8, 64, dtype=torch.bfloat16).to(device)
    exact[2, 5, 7], exact[4, 0, 0] = math.nan, math.inf
    values, weights = dsa.quantize_index_q(exact, torch.ones(5, 8, device=device))
    latents, scales = dsa.quantize_latents(exact)
    for row in (values.float() * weights[..., None], latents.float() * scales[..., None]):
        broken = row.isnan().all(-1)
        assert broken.nonzero().tolist() == [[2, 5], [4, 0]]
        assert row[~broken].isfinite().all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_broken_row_is_quantised_to_nan_alone_interpreted(interpreter, power_of_two):
    exact = Draw(1).normal(9, 64, dtype=torch.bfloat16)
    exact[2, 5], exact[4, 0] = math.nan, math.inf
    spec, config = QuantizeSpec(64, power_of_two=power_of_two), Config.of("triton", block_t=4, num_warps=1)
    outputs = run_interpreted(interpreter, "quantize", spec, config, {"source": exact})
    latent = outputs["values"].float() * outputs["scales"][:, None]
    assert latent[[2, 4]].isnan().all()
    assert latent[[0, 1, 3, 5, 6, 7, 8]].isfinite().all()


def test_the_kernel_carries_nan_to_the_scale_and_the_values():
    for op, spec in (("quantize", QuantizeSpec(64)), ("quantize", QuantizeSpec(64, power_of_two=True))):
        code = render(ops.get(op), spec, Config.of("triton", block_t=4, num_warps=1)).code
        assert "tl.max(" not in code
        assert code.count("propagate_nan=tl.PropagateNan.ALL") == 2  # of the largest magnitude, of the clamp


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["v32", "v4"])
def test_a_broken_row_is_nan_where_it_is_read_back(device, layout):
    draw = Draw(2)
    kv = kv_layout(layout)
    nope, rope = (draw.normal(6, width, dtype=torch.bfloat16).to(device) for width in (kv.d_nope, 64))
    nope[1, 3], nope[3, 300] = math.nan, math.inf
    cache = kv.empty(2, device)
    slots = torch.arange(6, device=device)
    dsa.store_kv(nope, rope, slots, cache, layout=layout)
    latent = dsa.gather_kv(cache, slots, layout=layout)
    assert latent[1, : kv.group].isnan().all()
    group = 300 // kv.group
    assert latent[3, group * kv.group : (group + 1) * kv.group].isnan().all()
    assert latent[1, kv.group :].isfinite().all()
    assert latent[[0, 2, 4, 5]].isfinite().all()


ROWS = [name for name, (scales, _) in ROW_SCALES.items() if scales != "none"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["v41", *ROWS])
def test_a_broken_row_of_any_channels_is_nan_where_it_is_read_back(device, layout):
    """In its own group of channels, of its own row, alone."""
    kv = kv_layout(layout, 64, 256, 0, 256)
    nope = Draw(2).normal(6, kv.d_nope, dtype=torch.bfloat16).to(device)
    nope[1, 3], nope[3, kv.d_nope - 1] = math.nan, math.inf
    cache, slots = kv.empty(1, device).view(1, 64, 1, -1), torch.arange(6, device=device)
    dsa.store_kv(nope, None, slots, cache, layout=layout)
    latent = dsa.gather_kv(cache, slots, layout=layout, d_rope=0)
    broken = torch.zeros_like(latent, dtype=torch.bool)
    broken[1, : kv.group], broken[3, -kv.group :] = True, True
    assert latent[broken].isnan().all()
    assert latent[~broken].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_is_nan_where_it_is_read_back(device):
    layout = IndexKLayout(64, 64)
    keys, slots = Draw(2).normal(6, 64, dtype=torch.bfloat16).to(device), torch.arange(6, device=device)
    keys[1, 3], keys[3, 0] = math.nan, -math.inf
    cache = layout.empty(1, device)
    dsa.store_index_k(keys, slots, cache)
    values, scales = dsa.gather_index_k(cache, slots)
    read = values.float() * scales[:, None]
    assert read[[1, 3]].isnan().all()
    assert read[[0, 2, 4, 5]].isfinite().all()


def prefill_inputs(device, lengths, sink, heads=16):
    draw = Draw(7, device)
    q = draw.normal(6, heads, 576, dtype=torch.bfloat16)
    indices = draw.integers(0, 100, 6, 1, 64)
    indices[1] = -1
    indices[3] = 100
    q[1], q[3], q[4, 2, 5] = math.nan, math.inf, math.nan
    return {
        "q": q,
        "kv": draw.normal(100, 1, 576, dtype=torch.bfloat16, scale=0.1),
        "indices": indices,
        "sm_scale": 576**-0.5,
        "lengths": torch.tensor([64, 64, 0, 40, 64, 3], dtype=torch.int32, device=device) if lengths else None,
        "sink": draw.normal(heads) if sink else None,
    }


def assert_padding(out, lse, lengths):
    """Rows 1 and 3 have no token, row 2 none where lengths count; of row 4 one head is broken."""
    empty = [1, 3, *([2] if lengths else [])]
    assert not out[empty].any()
    assert (lse[empty] == -math.inf).all()
    assert out[4, 2].isnan().all()
    assert lse[4, 2].isnan()
    assert out[4, [0, 1, 3]].isfinite().all()
    assert out[[0, 5]].isfinite().all()
    assert lse[[0, 5]].isfinite().all()


OPTIONS = pytest.mark.parametrize(("lengths", "sink"), [(False, False), (True, False), (False, True), (True, True)])


ON_GPU = [  # TileLang's take 15 s each to compile
    pytest.param("cuda", config, *options, marks=pytest.mark.gpu)
    for config in PREFILL
    for options in ((False, False), (True, True), *([(True, False), (False, True)] if config == "triton" else []))
]
ON_CPU = [("cpu", "triton", lengths, sink) for lengths in (False, True) for sink in (False, True)]


@pytest.mark.parametrize(("device", "config", "lengths", "sink"), [*ON_CPU, *ON_GPU])
def test_a_row_without_a_token_is_zero_whatever_q_holds(device, config, lengths, sink):
    inputs = prefill_inputs(device, lengths, sink)
    with under(device, "attention", PREFILL[config]):
        out, lse = dsa.sparse_attention(*list(inputs.values())[:4], lengths=inputs["lengths"], sink=inputs["sink"])
    assert_padding(out, lse, lengths)


def test_a_row_without_a_token_is_zero_interpreted(interpreter):
    inputs = prefill_inputs("cpu", True, True)
    spec = AttentionSpec(16, 576, 64, lengths=True, sink=True)
    outputs = run_interpreted(interpreter, "attention", spec, PREFILL["triton"], inputs)
    assert_padding(outputs["out"], outputs["lse"], True)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_a_row_without_a_token_is_zero_emulated(tmp_path):
    op, inputs, spec = (
        ops.get("attention"),
        prefill_inputs("cpu", True, True),
        AttentionSpec(16, 576, 64, lengths=True, sink=True),
    )
    kernels = emulator.cuda_kernels(render(op, spec, PREFILL["cuda"]), tmp_path, "shuffled")
    outputs = Variant(op, spec, PREFILL["cuda"], H200, kernels).run(inputs, op.allocate(spec, inputs))
    assert_padding(outputs["out"], outputs["lse"], True)


CLUSTERS, PAIRS = (
    ops.get("attention").config("cuda", {"interleave": False, "l2_prefetch": 256, **values})
    for values in (
        {"num_stages": 3, "turns": True, "consumer_registers": 224},
        {"num_stages": 2, "turns": False, "consumer_registers": 216},
    )
)
DESIGNS = {  # of kernels for many heads, and for FP8 products: heads, products, config
    "clusters": (128, "bf16", CLUSTERS),
    "pairs": (64, "bf16", PAIRS),
    "two pairs": (128, "bf16", PAIRS.replace(interleave=True)),
    "fp8 pairs": (64, "fp8", PAIRS.replace(num_stages=4)),
    "fp8 triton": (16, "fp8", PREFILL["triton"]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_row_without_a_token_is_zero_in_every_design(design, optional):
    heads, products, config = DESIGNS[design]
    inputs = prefill_inputs("cuda", optional, optional, heads)
    options = {"lengths": inputs["lengths"], "sink": inputs["sink"], "math": products}
    with dispatch.override(ops.get("attention"), config):
        out, lse = dsa.sparse_attention(*list(inputs.values())[:4], **options)
    assert_padding(out, lse, optional)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("design", ["pairs", pytest.param("fp8 pairs", marks=FURTHER)])
def test_a_row_without_a_token_is_zero_in_every_design_emulated(design, tmp_path):
    heads, products, config = DESIGNS[design]
    inputs = prefill_inputs("cpu", True, True, heads)
    if products == "fp8":
        for name in ("q", "kv"):
            inputs[name], inputs[f"{name}_scale"] = dsa.quantize_latents(inputs[name])
    op, spec = ops.get("attention"), AttentionSpec(heads, 576, 64, lengths=True, sink=True, math=products)
    kernels = emulator.cuda_kernels(render(op, spec, config), tmp_path, "shuffled")
    outputs = Variant(op, spec, config, replace(H200, sms=1), kernels).run(inputs, op.allocate(spec, inputs))
    assert_padding(outputs["out"], outputs["lse"], True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_without_a_token_is_zero_in_grouped_queries(device):
    """Its own keys and values, one list for each KV head; only the broken head is NaN."""
    inputs = prefill_inputs(device, True, True)
    draw = Draw(9, device)
    k, v = (draw.normal(100, 2, width, dtype=torch.bfloat16, scale=0.1) for width in (64, 32))
    q, lists = inputs["q"][..., :64].contiguous(), inputs["indices"].expand(6, 2, 64).contiguous()
    lengths = inputs["lengths"][:, None].expand(6, 2).contiguous()
    out, lse = dsa.sparse_attention_gqa(q, k, v, lists, 0.1, lengths=lengths, sink=inputs["sink"])
    assert_padding(out, lse, True)


def decode_inputs(device, layout, lengths, sink):
    inputs = prefill_inputs(device, lengths, sink)
    kv = kv_layout(layout)
    draw = Draw(8, device)
    cache = kv.empty(2, device)
    nope, rope = (draw.normal(100, width, dtype=torch.bfloat16, scale=0.1) for width in (kv.d_nope, 64))
    dsa.store_kv(nope, rope, torch.arange(100, device=device), cache, layout=layout)
    indices = inputs["indices"].masked_fill(inputs["indices"] == 100, 128)
    return {
        "q": inputs["q"][:, None, :, : kv.d_nope + 64].contiguous(),
        "cache": cache,
        "indices": indices,
        **dict(list(inputs.items())[3:]),
    }


@OPTIONS
@pytest.mark.parametrize("layout", ["v32", "v4"])
@pytest.mark.parametrize("config", DECODE)
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_a_padded_batch_is_zero_whatever_q_holds(device, config, layout, lengths, sink):
    inputs = decode_inputs(device, layout, lengths, sink)
    with under(device, "attention_paged", DECODE[config]):
        out, lse = dsa.sparse_attention_paged(*list(inputs.values())[:4], lengths=inputs["lengths"], sink=inputs["sink"])
    assert_padding(out[:, 0], lse[:, 0], lengths)


@pytest.mark.parametrize("config", ["bits", "cast"])
@pytest.mark.parametrize("layout", ["v32", "v4"])
def test_a_row_of_a_padded_batch_is_zero_interpreted(interpreter, layout, config):
    inputs = decode_inputs("cpu", layout, True, True)
    spec = AttentionPagedSpec(16, 64, layout, lengths=True, sink=True)
    outputs = run_interpreted(interpreter, "attention_paged", spec, DECODE[config], inputs)
    assert_padding(outputs["out"][:, 0], outputs["lse"][:, 0], True)


def broken_cache(layout, device, byte):
    """A cache of 64 tokens; token 5 has a NaN byte in its e4m3."""
    inputs = decode_inputs(device, layout, False, False)
    pages = as_pages(kv_layout(layout), inputs["cache"])
    field = kv_layout(layout).nope
    pages[0, field.base + 5 * field.stride + 130] = byte
    row = torch.arange(64, dtype=torch.int32, device=device).view(1, 1, 64)
    with_it, without = row, row.masked_fill(row == 5, -1)
    indices = torch.cat([with_it, without])
    q = inputs["q"][[0, 5]]
    return {"q": q, "cache": inputs["cache"], "indices": indices, "sm_scale": inputs["sm_scale"], "lengths": None, "sink": None}


def assert_broken_once(out, lse):
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("layout", ["v32", "v4"])
@pytest.mark.parametrize("config", DECODE)
@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_byte_of_a_chosen_token_is_nan(device, config, layout, byte):
    inputs = broken_cache(layout, device, byte)
    with under(device, "attention_paged", DECODE[config]):
        assert_broken_once(*dsa.sparse_attention_paged(*list(inputs.values())[:4]))


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("layout", ["v32", "v4"])
def test_a_nan_byte_of_a_chosen_token_is_nan_interpreted(interpreter, layout, byte):
    inputs = broken_cache(layout, "cpu", byte)
    outputs = run_interpreted(interpreter, "attention_paged", AttentionPagedSpec(16, 64, layout), DECODE["bits"], inputs)
    assert_broken_once(outputs["out"], outputs["lse"])


def test_a_nan_scale_of_a_chosen_token_is_nan_interpreted(interpreter):
    inputs = broken_cache("v4", "cpu", 0)
    layout = kv_layout("v4")
    as_pages(layout, inputs["cache"])[0, layout.scales.base + 5 * layout.scales.stride] = 255
    outputs = run_interpreted(interpreter, "attention_paged", AttentionPagedSpec(16, 64, "v4"), DECODE["bits"], inputs)
    assert_broken_once(outputs["out"], outputs["lse"])


def scaled_cache(exponent, device):
    """A cache of 64 tokens whose latents are all 1.5 · 2^exponent, so that out is, whatever the weights are."""
    layout = KvV32Layout()
    cache = layout.empty(1, device)
    nope = torch.full((64, 512), 1.5, device=device).to(FP8)
    scales = torch.full((64, 4), 2.0**exponent, device=device)
    layout.pack(cache, torch.arange(64, device=device), nope, scales, torch.zeros(64, 64, device=device))
    q = torch.zeros(1, 1, 16, 576, dtype=torch.bfloat16, device=device)
    q[..., 0] = 2.0 ** -abs(exponent)
    indices = torch.arange(64, dtype=torch.int32, device=device).view(1, 1, 64)
    return {"q": q, "cache": cache, "indices": indices, "sm_scale": 0.1, "lengths": None, "sink": None}


@pytest.mark.parametrize("exponent", [-40, 0, 38, 39])
def test_scales_are_right_to_the_edge_of_their_range(interpreter, exponent):
    inputs = scaled_cache(exponent, "cpu")
    outputs = run_interpreted(interpreter, "attention_paged", AttentionPagedSpec(16, 64), DECODE["bits"], inputs)
    assert (outputs["out"] == 1.5 * 2.0**exponent).all()


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-40, 0, 38, 39])
@pytest.mark.parametrize("config", DECODE)
def test_scales_are_right_to_the_edge_of_their_range_on_a_gpu(config, exponent):
    inputs = scaled_cache(exponent, "cuda")
    with dispatch.override(ops.get("attention_paged"), DECODE[config]):
        out, _ = dsa.sparse_attention_paged(*list(inputs.values())[:4])
    torch.testing.assert_close(out.float(), torch.full_like(out, 1.5 * 2.0**exponent).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("exponent", [40, 100])
def test_scales_beyond_their_range_are_never_taken_for_others(interpreter, exponent):
    inputs = scaled_cache(exponent, "cpu")
    outputs = run_interpreted(interpreter, "attention_paged", AttentionPagedSpec(16, 64), DECODE["bits"], inputs)
    assert not outputs["out"].isfinite().any()
