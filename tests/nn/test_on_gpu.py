"""The module on a GPU: what the CPU computes; compiled whole; its decode step captured, with nothing built after a warmup."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import nn
from dsa_codegen.problem.compare import similarity_gap

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")]
TINY = dsa.preset("tiny")
SHAPE = nn.Shape(hidden=96, q_rank=48, d_head=32, d_v=24)
CACHES = pytest.mark.parametrize("plain", [None, torch.bfloat16], ids=["fp8", "bf16"])


def made(device="cuda", model=TINY, shape=SHAPE):
    torch.manual_seed(3)
    return nn.SparseAttention(model, shape).to(device)


def drawn(device="cuda", tokens=160):
    return torch.randn(2, tokens, SHAPE.hidden, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)


def prefilled(layer, hidden, plain, tokens=75):
    caches = nn.PagedCache(TINY, nn.rotary_table(256, 64, device=hidden.device), layers=1, blocks=8, batch=2, plain=plain)
    layer(hidden[:, :tokens].flatten(0, 1), caches.layers[0], caches.prefill((tokens, tokens)))
    return caches


@CACHES
@pytest.mark.parametrize("tokens", [60, 150], ids=["short", "scored"])
def test_gives_what_the_cpu_does(plain, tokens):
    outs = []
    for device in ("cpu", "cuda"):
        layer, hidden = made(device), drawn(device)
        caches = nn.PagedCache(TINY, nn.rotary_table(256, 64, device=device), layers=1, blocks=8, batch=2, plain=plain)
        step = caches.prefill((tokens, tokens - 7))
        whole = torch.cat((hidden[0, :tokens], hidden[1, : tokens - 7]))
        prefill = layer(whole, caches.layers[0], step)
        decode = layer(hidden[:, 155], caches.layers[0], caches.decode(1))
        outs.append(torch.cat((prefill, decode)).cpu())
    # A token may be chosen or not where two score nearly alike.
    assert similarity_gap(*outs) < (1e-4 if tokens <= TINY.topk else 1e-2)


@CACHES
@pytest.mark.parametrize("max_context", [64, 256], ids=["short", "scored"])
def test_a_captured_decode_step_is_the_same(plain, max_context):
    layer, hidden = made(), drawn()
    tokens = 50 if max_context <= TINY.topk else 90
    built = layer.warmup(max_queries=256, max_batch=2, max_context=256, next_n=(1,), plain_latents=plain is not None)
    assert built >= 0
    eager, captured = (prefilled(layer, hidden, plain, tokens) for _ in range(2))
    before = {name: count for name, count in dsa.stats().items() if "built during a call" in name}
    given = torch.empty(2, SHAPE.hidden, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    captured.grow((1, 1))
    with torch.cuda.graph(graph):
        result = layer(given, captured.layers[0], captured.step(1, max_context))
    for number in range(6):
        given.copy_(hidden[:, tokens + number])
        if number:
            captured.grow((1, 1))
        graph.replay()
        eager.grow((1, 1))
        expected = layer(given, eager.layers[0], eager.step(1, max_context))
        assert torch.equal(result, expected), number
    assert captured.lengths.tolist() == captured.held
    assert {name: count for name, count in dsa.stats().items() if "built during a call" in name} == before


@CACHES
@pytest.mark.parametrize("next_n", [0, 2], ids=["prefill", "decode"])
def test_a_compiled_layer_is_close(plain, next_n):
    torch._dynamo.reset()
    layer, hidden = made(), drawn()
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for call in (layer, compiled):
        caches = prefilled(layer, hidden, plain)
        step = caches.decode(next_n) if next_n else caches.prefill((5, 7))
        results.append(call(hidden[0, : len(step.positions)], caches.layers[0], step))
        results.append(caches.layers[0].kv.clone())
    out, kv, other, other_kv = results
    assert similarity_gap(out, other) < 1e-2  # torch's own products are rounded elsewhere
    assert (kv != other_kv).float().mean() < 0.01


def test_deepseek_v3_2_decodes_from_a_long_context():
    """Its own dimensions: eight of its heads, one rank's, over caches of 8K tokens."""
    model = dsa.preset("deepseek-v3.2-tp8")
    shape = nn.Shape(hidden=7168, q_rank=1536)
    torch.manual_seed(3)
    with torch.device("cuda"):
        layer = nn.SparseAttention(model, shape)
    caches = nn.PagedCache(model, nn.rotary_table(8320, 64, device="cuda"), layers=1, blocks=260, batch=2)
    hidden = torch.randn(8192 + 300, 7168, device="cuda", dtype=torch.bfloat16)
    whole = layer(hidden, caches.layers[0], caches.prefill((8192, 300)))
    assert whole.isfinite().all()
    for _ in range(2):
        out = layer(hidden[:2], caches.layers[0], caches.decode(1))
        assert out.isfinite().all()
    assert caches.held == [8194, 302]
