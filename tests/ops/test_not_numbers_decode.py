"""Decode over paged caches: rows without a token are zero, NaN bytes and scales stay visible, scales right to their edge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention_paged import AttentionPagedSpec
from dsa_codegen.problem.caches import KvV32Layout, as_pages
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.kv_layouts import kv_layout
from dsa_codegen.problem.op import Config
from dsa_codegen.runtime import dispatch

import emulator
from broken_rows import DEVICES, FP8, assert_padding, prefill_inputs, under
from paged_designs import CLUSTERS
from support import H200, run_interpreted

DECODE = {
    "gluon": Config.of("gluon", splits=1),
    "split": Config.of("gluon", splits=2),
    "cuda": CLUSTERS.replace(splits=1),
    "cuda split": CLUSTERS.replace(splits=2),
    "cuda sharers": CLUSTERS.replace(sharers=4),
    "cuda columns": CLUSTERS.replace(sharers=4, columns=16),
    "cuda stream": CLUSTERS.replace(splits=2, columns=16),
    "cuda roles": CLUSTERS.replace(splits=2, columns=16, placers=16),
    "cuda rounds": CLUSTERS.replace(head_rounds=1),
    "cuda flat": CLUSTERS.replace(flat=True),
    "bits": Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="bits", splits=1),
    "cast": Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="cast", splits=2),
}
SERVED = pytest.mark.parametrize(
    ("layout", "config"),
    [
        (layout, name)
        for layout in ("v32", "v4")
        for name in DECODE
        if layout == "v32" or name not in ("cuda stream", "cuda roles")
    ],
)
OPTIONS = pytest.mark.parametrize(("lengths", "sink"), [(False, False), (True, False), (False, True), (True, True)])


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
@SERVED
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
@SERVED
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


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("exponent", [-100, -40, 38, 39])
@pytest.mark.parametrize("config", [name for name in DECODE if name.startswith("cuda")])
def test_parts_are_right_to_the_edge_of_their_range(tmp_path, config, exponent):
    """They are fp16 of a power of two that comes along."""
    op, spec, gpu = ops.get("attention_paged"), AttentionPagedSpec(16, 128), replace(H200, sms=4)
    inputs = scaled_cache(exponent, "cpu")
    inputs["indices"] = inputs["indices"].repeat(1, 1, 2)
    kernels = emulator.cuda_kernels(render(op, spec, DECODE[config]), tmp_path, "shuffled")
    outputs = Variant(op, spec, DECODE[config], gpu, kernels).run(inputs, op.allocate(spec, inputs))
    assert (outputs["out"] == 1.5 * 2.0**exponent).all()


@pytest.mark.parametrize("exponent", [40, 100])
def test_scales_beyond_their_range_are_never_taken_for_others(interpreter, exponent):
    inputs = scaled_cache(exponent, "cpu")
    outputs = run_interpreted(interpreter, "attention_paged", AttentionPagedSpec(16, 64), DECODE["bits"], inputs)
    assert not outputs["out"].isfinite().any()
