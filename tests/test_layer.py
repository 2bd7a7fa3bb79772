"""The layer: its stages agree with their references one after another, in prefill and over paged caches."""

from __future__ import annotations

import weakref

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import functions, ops
from dsa_codegen.caches import IndexKLayout, kv_layout
from dsa_codegen.compare import ATTENTION, LOGITS, LSE, close, equal
from dsa_codegen.draw import Draw
from dsa_codegen.presets import Model

TINY = dsa.preset("tiny")
V4 = Model("v4", heads=8, d_nope=448, d_rope=64, index_heads=8, index_head_dim=32, topk=64, kv_layout="v4", attn_sink=True)


def prefill_inputs(model: Model, queries: int, tokens: int, device: str = "cpu"):
    draw = Draw(11, device)
    d = model.d_nope + model.d_rope
    keys = draw.normal(tokens, model.index_head_dim, dtype=torch.bfloat16)
    index_k, index_k_scale = dsa.quantize_index_k(keys)
    ends = torch.arange(tokens - queries + 1, tokens + 1, dtype=torch.int32, device=device)
    return {
        "q": draw.normal(queries, model.heads, d, dtype=torch.bfloat16, scale=10.0),
        "kv": draw.normal(tokens, 1, d, dtype=torch.bfloat16, scale=0.1),
        "index_q": draw.normal(queries, model.index_heads, model.index_head_dim, dtype=torch.bfloat16),
        "index_weights": draw.normal(queries, model.index_heads),
        "index_k": index_k,
        "index_k_scale": index_k_scale,
        "starts": torch.zeros_like(ends),
        "ends": ends,
        "sink": draw.normal(model.heads) if model.attn_sink else None,
    }


def decode_inputs(model: Model, batch: int, next_n: int, context: int, device: str = "cpu"):
    draw = Draw(12, device)
    pages = -(-context // model.page)
    blocks = batch * pages + 1
    kv, index = kv_layout(model.kv_layout, model.page), IndexKLayout(model.page, model.index_head_dim)
    kv_cache, index_cache = kv.empty(blocks, device=device), index.empty(blocks, device=device)
    slots = torch.arange(blocks * model.page, dtype=torch.int32, device=device)
    tokens = len(slots)
    nope = draw.normal(tokens, model.d_nope, dtype=torch.bfloat16, scale=0.1)
    dsa.store_kv(
        nope, draw.normal(tokens, model.d_rope, dtype=torch.bfloat16, scale=0.1), slots, kv_cache, layout=model.kv_layout
    )
    dsa.store_index_k(draw.normal(tokens, model.index_head_dim, dtype=torch.bfloat16), slots, index_cache)
    lengths = draw.integers(1, context + 1, batch, 1).expand(batch, next_n).contiguous()
    d = model.d_nope + model.d_rope
    return {
        "q": draw.normal(batch, next_n, model.heads, d, dtype=torch.bfloat16, scale=10.0),
        "kv_cache": kv_cache,
        "index_q": draw.normal(batch, next_n, model.index_heads, model.index_head_dim, dtype=torch.bfloat16),
        "index_weights": draw.normal(batch, next_n, model.index_heads),
        "index_cache": index_cache,
        "lengths": lengths,
        "page_table": draw.permutation(blocks)[: batch * pages].view(batch, pages).int(),
        "max_context": context,
        "sink": draw.normal(model.heads) if model.attn_sink else None,
    }


def reference(name: str, *args):
    """The reference of a public function's operation, on the same device."""
    op = next(op for op in ops.all_ops().values() if op.function == name)
    spec, _, inputs = op.bind(*args)
    return op.reference(spec, inputs)


def assert_prefill_matches(layer: dsa.Layer, inputs: dict) -> None:
    """Each stage against its reference on what the stages before it really gave."""
    out, lse, chosen = layer.prefill(**inputs)
    q8, folded = dsa.quantize_index_q(inputs["index_q"], inputs["index_weights"])
    windows = inputs["starts"], inputs["ends"]
    keys = inputs["index_k"], inputs["index_k_scale"]
    logits = dsa.indexer_logits(q8, *keys, folded, *windows, clean=True)
    expected = reference("indexer_logits", q8, *keys, folded, *windows, "weighted_relu", "fp32", True)
    assert close("logits", logits, expected["logits"], LOGITS).passed
    topk = layer.model.topk
    assert equal("chosen", chosen, reference("select", logits, windows[1], topk, windows[0], None, 64, 0, 0)["chosen"]).passed
    attended = reference("sparse_attention", inputs["q"], inputs["kv"], chosen[:, None], layer.sm_scale, None, inputs["sink"])
    for name, value, limit in (("out", out, ATTENTION), ("lse", lse, LSE)):
        result = close(name, value, attended[name], limit)
        assert result.passed, result.detail


def assert_decode_matches(layer: dsa.Layer, inputs: dict) -> None:
    """As ``assert_prefill_matches``, over the paged caches."""
    out, lse, chosen = layer.decode(**inputs)
    q8, folded = dsa.quantize_index_q(inputs["index_q"].flatten(0, 1), inputs["index_weights"].flatten(0, 1))
    paged = inputs["lengths"], inputs["page_table"], inputs["max_context"]
    q8 = q8.view(inputs["index_q"].shape)
    logits = dsa.indexer_logits_paged(q8, inputs["index_cache"], folded, *paged, clean=True)
    expected = reference("indexer_logits_paged", q8, inputs["index_cache"], folded, *paged, "weighted_relu", "fp32", True)
    assert close("logits", logits, expected["logits"], LOGITS).passed
    model = layer.model
    slots = reference("select", logits, inputs["lengths"].flatten(), model.topk, None, inputs["page_table"], model.page, 0, 0)
    assert equal("chosen", chosen.flatten(0, 1), slots["chosen"]).passed
    attended = reference(
        "sparse_attention_paged", inputs["q"], inputs["kv_cache"], chosen, layer.sm_scale, None, inputs["sink"]
    )
    for name, value, limit in (("out", out, ATTENTION), ("lse", lse, LSE)):
        result = close(name, value, attended[name], limit)
        assert result.passed, result.detail


@pytest.mark.parametrize("model", [TINY, V4], ids=lambda model: model.name)
@pytest.mark.parametrize("queries", [0, 1, 9])
def test_prefill(model, queries):
    assert_prefill_matches(dsa.Layer(model), prefill_inputs(model, queries, 150))


def test_prefill_in_chunks_of_queries_is_the_same():
    inputs = prefill_inputs(TINY, 9, 150)
    whole, chunked = dsa.Layer(TINY).prefill(**inputs), dsa.Layer(TINY, logits_bytes=4 * 150 * 4).prefill(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_prefill_holds_the_logits_of_one_chunk_at_a_time(monkeypatch):
    made, compute = [], functions.indexer_logits

    def watched(*args, **options):
        assert all(logits() is None for logits in made)
        logits = compute(*args, **options)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(functions, "indexer_logits", watched)
    dsa.Layer(TINY, logits_bytes=4 * 150 * 4).prefill(**prefill_inputs(TINY, 9, 150))
    assert len(made) == 3


@pytest.mark.parametrize("model", [TINY, V4], ids=lambda model: model.name)
@pytest.mark.parametrize(("batch", "next_n"), [(1, 1), (3, 2)])
def test_decode(model, batch, next_n):
    assert_decode_matches(dsa.Layer(model), decode_inputs(model, batch, next_n, 200))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-flash"])
def test_prefill_at_full_size(name):
    model = dsa.preset(name)
    assert_prefill_matches(dsa.Layer(model), prefill_inputs(model, 4096, 32768, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-flash"])
def test_decode_at_full_size(name):
    model = dsa.preset(name)
    assert_decode_matches(dsa.Layer(model), decode_inputs(model, 64, 1, 16384, "cuda"))


@pytest.mark.gpu
def test_decode_in_a_cuda_graph_is_the_same():
    layer = dsa.Layer(TINY)
    inputs = decode_inputs(TINY, 3, 1, 500, "cuda")
    eager = layer.decode(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.decode(**inputs)
    for tensor in captured:
        tensor.view(torch.uint8).fill_(0x5A)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
