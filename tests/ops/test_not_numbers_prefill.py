"""Rows of prefill attention without a token are zero whatever their queries hold, and a broken row stays visible alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import AttentionSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Config
from dsa_codegen.runtime import dispatch

import emulator
from attention_configs import RING
from broken_rows import DEVICES, assert_padding, prefill_inputs, under
from support import FURTHER, H200, run_interpreted

PREFILL = {
    "tilelang": Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384),
    "multistage": Config.of("tilelang", pipeline="multistage", block_h=32, block_n=64, num_stages=2, threads=256),
    "triton": Config.of("triton", block_h=16, block_n=32, num_stages=2, num_warps=4),
    "cuda": RING,
}
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
