"""NaN and infinities in rows that are quantised or stored: they stay visible in their row or group alone."""

from __future__ import annotations

import math

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.kernels.render import render
from dsa_codegen.ops.quantize import QuantizeSpec
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.kv_layouts import ROW_SCALES, kv_layout
from dsa_codegen.problem.op import Config

from broken_rows import DEVICES
from support import run_interpreted


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
