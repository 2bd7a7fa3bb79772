"""Warmup of the module: afterwards nothing is built, whatever step comes within the limits."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import nn
from dsa_codegen.runtime import dispatch

from fake_gpu import under_public_functions


@pytest.fixture
def fake(monkeypatch):
    yield under_public_functions(monkeypatch)
    dispatch.reset()


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
@pytest.mark.parametrize("plain", [None, torch.bfloat16], ids=["fp8", "bf16"])
def test_nothing_is_built_after_warmup(fake, plain):
    model = dsa.preset("tiny")
    shape = nn.Shape(64, 32, 16, 16, hadamard=True)
    with torch.device("meta"):
        layer = nn.SparseAttention(model, shape)
    assert layer.warmup(max_queries=1100, max_batch=2, max_context=2048, next_n=(1, 3), plain_latents=plain is not None)
    before = len(fake.builds)
    caches = nn.PagedCache(model, nn.rotary_table(2048, 64, device="meta"), layers=1, blocks=64, batch=2, plain=plain)
    cache = caches.layers[0]

    def run(step):
        layer(torch.empty(len(step.positions), 64, dtype=torch.bfloat16, device="meta"), cache, step)

    run(caches.prefill((40, 1)))
    run(caches.decode(1))
    run(caches.prefill((1000, 60)))
    for next_n in (1, 3):
        run(caches.decode(next_n))
    assert len(fake.builds) == before
    assert layer.warmup(max_queries=1100, max_batch=2, max_context=2048, next_n=(1, 3), plain_latents=plain is not None) == 0
