"""The layer: its stages agree with their references one after another, in prefill and over paged caches."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import functions, ops
from dsa_codegen.errors import InputError
from dsa_codegen.problem.caches import KvV4Layout
from dsa_codegen.problem.compare import ATTENTION, LOGITS, LSE, close, equal

from layer_inputs import NARROW, TINY, V4, decode_inputs, prefill_inputs


def reference(name: str, *args):
    """The reference of a public function's operation, on the same device; arguments may be left out as in a call."""
    op = next(op for op in ops.all_ops().values() if op.function == name)
    arguments = torch._C.parse_schema(f"any::{op.function}{op.schema}").arguments
    spec, _, inputs = op.bind(*args, *(argument.default_value for argument in arguments[len(args) :]))
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
    model = layer.model
    kept = model.keep_first, model.keep_recent
    wanted = reference("select", logits, windows[1], model.topk, windows[0], None, 64, *kept)["chosen"]
    assert equal("chosen", chosen, wanted).passed
    of = inputs["q"], inputs["kv"], chosen[:, None], layer.sm_scale, None, inputs["sink"], 1, False, model.d_v
    attended = reference("sparse_attention", *of)
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
    kept = model.page, model.keep_first, model.keep_recent
    slots = reference("select", logits, inputs["lengths"].flatten(), model.topk, None, inputs["page_table"], *kept)
    assert equal("chosen", chosen.flatten(0, 1), slots["chosen"]).passed
    of = inputs["q"], inputs["kv_cache"], chosen, layer.sm_scale, None, inputs["sink"], None, None, None, False
    stored = "" if model.kv_layout in ("v32", "v4") else model.kv_layout
    attended = reference("sparse_attention_paged", *of, stored, model.d_v)
    for name, value, limit in (("out", out, ATTENTION), ("lse", lse, LSE)):
        result = close(name, value, attended[name], limit)
        assert result.passed, result.detail


@pytest.mark.parametrize("model", [TINY, V4, NARROW], ids=lambda model: model.name)
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


@pytest.mark.parametrize("model", [TINY, V4, NARROW], ids=lambda model: model.name)
@pytest.mark.parametrize(("batch", "next_n"), [(1, 1), (3, 2), (0, 1), (0, 2)])
def test_decode(model, batch, next_n):
    assert_decode_matches(dsa.Layer(model), decode_inputs(model, batch, next_n, 200))


@pytest.mark.parametrize(
    ("model", "argument", "change"),
    [
        (TINY, "q", lambda q: q[..., :8, :].contiguous()),
        (TINY, "index_q", lambda index_q: index_q.repeat(1, 1, 2, 1)),
        (TINY, "sink", lambda sink: torch.zeros(16)),
        (V4, "sink", lambda sink: None),
        (TINY, "kv_cache", lambda cache: cache.view(-1, 32, 1, 656)),
        (TINY, "index_cache", lambda cache: cache.view(-1, 32, 1, 68)),
        (V4, "kv_cache", lambda cache: KvV4Layout(32).empty(9)),
    ],
    ids=lambda value: getattr(value, "name", value) if not callable(value) else "",
)
def test_refuses_what_the_model_does_not_state(model, argument, change):
    inputs = decode_inputs(model, 2, 1, 100)
    with pytest.raises(InputError, match=rf"^{argument}: .* as {model.name} "):
        dsa.Layer(model).decode(**{**inputs, argument: change(inputs[argument])})


def padded(inputs):
    """The batch with a row behind it that no sequence has: no tokens, and whatever was in memory."""
    inputs["q"][-1], inputs["index_q"][-1], inputs["index_weights"][-1] = math.nan, math.nan, math.inf
    inputs["lengths"][-1] = 0
    inputs["page_table"][-1] = 1 << 30
    return inputs


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("model", [TINY, V4, NARROW], ids=lambda model: model.name)
def test_a_padded_batch_is_the_batch_and_zeros(model, device):
    inputs = padded(decode_inputs(model, 3, 1, 200, device))
    batched = ("q", "index_q", "index_weights", "lengths", "page_table")
    whole = dsa.Layer(model).decode(**inputs)
    alone = dsa.Layer(model).decode(**{name: value[:2] if name in batched else value for name, value in inputs.items()})
    assert all(torch.equal(a[:2], b) for a, b in zip(whole, alone, strict=True))
    assert not whole.out[2].any()
    assert (whole.lse[2] == -math.inf).all()
    assert (whole.chosen[2] == -1).all()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("index_q", lambda value: value[:4]),
        ("index_weights", lambda value: value[:4]),
        ("index_weights", lambda value: value.tolist()),
        ("starts", lambda value: value[:4]),
        ("ends", lambda value: value[:4]),
        ("ends", lambda value: value.long()),
        ("kv", lambda value: value[:100]),
        ("kv", lambda value: None),
        ("index_k", lambda value: value[:100]),
        ("index_k_scale", lambda value: value[:100]),
        ("q", lambda value: value[None]),
        ("q", lambda value: value.tolist()),
    ],
)
def test_prefill_refuses_what_does_not_fit_together(argument, change):
    inputs = prefill_inputs(TINY, 5, 150)
    if argument == "index_k":
        argument = "kv"  # more of it than of the keys
        inputs["index_k"] = change(inputs["index_k"])
    else:
        inputs[argument] = change(inputs[argument])
    with pytest.raises(InputError, match=f"^{argument}:"):
        dsa.Layer(TINY).prefill(**inputs)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("index_q", lambda value: value[:2]),
        ("index_weights", lambda value: value[:2]),
        ("lengths", lambda value: value[:2]),
        ("page_table", lambda value: value[:2]),
        ("kv_cache", lambda value: value[:-1]),
        ("kv_cache", lambda value: [value]),
        ("q", lambda value: value[:, 0]),
    ],
)
def test_decode_refuses_what_does_not_fit_together(argument, change):
    inputs = decode_inputs(TINY, 3, 1, 100)
    with pytest.raises(InputError, match=f"^{argument}:"):
        dsa.Layer(TINY).decode(**{**inputs, argument: change(inputs[argument])})


@pytest.mark.parametrize(("arguments", "named"), [(("tiny",), "model"), ((None,), "model"), ((TINY, "1G"), "logits_bytes")])
def test_refuses_to_be_made_of_anything_else(arguments, named):
    with pytest.raises(InputError, match=f"^{named}:"):
        dsa.Layer(*arguments)


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "deepseek-v3.2", "deepseek-v4-flash"])
def test_a_capture_may_follow_warmup_at_once(name):
    """In a process of its own: no kernel was launched before, neither by another test nor by a step without a graph."""
    script = Path(__file__).parent / "support" / "capture_after_warmup.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path])}
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["prefill", "decode"]
