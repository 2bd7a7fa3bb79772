"""A choice whose size follows the content: in one call with the scores, in chunks, over paged caches, and in a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import adaptive, ops
from dsa_codegen.distributed import DataParallel, TensorParallel
from dsa_codegen.errors import InputError
from dsa_codegen.problem.draw import Draw
from dsa_codegen.runtime.serving import Limits

from layer_inputs import TINY, decode_inputs, prefill_inputs

RULE = dsa.Adaptive(mass=0.5, mass_scale=6.0)


def scored(queries=13, tokens=500):
    draw = Draw(7)
    q, weights = dsa.quantize_index_q(draw.normal(queries, 8, 64, dtype=torch.bfloat16), draw.normal(queries, 8))
    k, k_scale = dsa.quantize_index_k(draw.normal(tokens, 64, dtype=torch.bfloat16))
    ends = torch.arange(tokens - queries + 1, tokens + 1, dtype=torch.int32)
    return q, k, k_scale, weights, torch.zeros_like(ends), ends


def test_index_select_takes_what_adapt_takes_of_its_choice():
    call = scored()
    lengths, best = torch.empty(13, dtype=torch.int32), torch.empty(13, 64)
    found = dsa.index_select(*call, 64, keep_recent=5, adaptive=RULE, chosen_lengths=lengths, chosen_scores=best)
    logits = dsa.indexer_logits(*call)
    tokens = dsa.select(logits, call[-1], 64, starts=call[-2], keep_recent=5)
    cut = {**RULE.options(), "starts": call[-2], "keep_recent": 5, "chosen_scores": True}
    for value, expected in zip((found, lengths, best), dsa.adapt(logits, tokens, call[-1], **cut), strict=True):
        assert torch.equal(value, expected)
    assert 5 <= lengths.min() < lengths.max() < 64


@pytest.mark.parametrize("of_rows", [False, True])
def test_chunks_take_what_the_whole_takes(of_rows):
    call, draw = scored(), Draw(2)
    rule = dsa.Adaptive(draw.normal(13) + 1, draw.uniform(13), counts=draw.integers(0, 50, 13)) if of_rows else RULE
    results = []
    for max_bytes in (1 << 30, 4 * 512 * 4):
        lengths, out = torch.empty(13, dtype=torch.int32), torch.empty(13, 64, dtype=torch.int32)
        options = {"adaptive": rule, "chosen_lengths": lengths, "max_bytes": max_bytes, "batch_invariant": True}
        assert dsa.index_select(*call, 64, **options, out=out) is out
        results.append((out, lengths))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("slots", [True, False])
def test_paged_choices_are_those_of_their_tokens(slots):
    inputs = decode_inputs(TINY, 3, 2, 200)
    q, weights = dsa.quantize_index_q(inputs["index_q"].flatten(0, 1), inputs["index_weights"].flatten(0, 1))
    call = q.view(3, 2, 8, 64), inputs["index_cache"], weights, inputs["lengths"], inputs["page_table"], 200, 64
    lengths = torch.empty(3, 2, dtype=torch.int32)
    rule = replace(RULE, counts=torch.tensor([[60, 3], [60, 60], [9, 60]], dtype=torch.int32))
    found = dsa.index_select_paged(*call, slots=slots, adaptive=rule, chosen_lengths=lengths)
    tokens = dsa.index_select_paged(*call, slots=False, adaptive=rule, chosen_lengths=torch.empty_like(lengths))
    expected = dsa.choice.slots_of(tokens.flatten(0, 1), inputs["page_table"], 64).view(3, 2, 64) if slots else tokens
    assert torch.equal(found, expected)
    assert torch.equal(lengths, (tokens >= 0).sum(-1, dtype=torch.int32))
    assert lengths[0, 1] <= 3


def test_a_layer_attends_to_what_its_rule_takes():
    inputs = prefill_inputs(TINY, 5, 300)
    layer, lengths = dsa.Layer(TINY, adaptive=RULE), torch.empty(5, dtype=torch.int32)
    out, lse, chosen = layer.prefill(**inputs, chosen_lengths=lengths)
    assert torch.equal(lengths, (chosen >= 0).sum(1, dtype=torch.int32))
    assert lengths.max() < 64
    plain = dsa.Layer(TINY).prefill(**inputs).chosen
    assert all(set(few.tolist()) <= {-1, *many.tolist()} for few, many in zip(chosen, plain, strict=True))
    again = dsa.sparse_attention(inputs["q"], inputs["kv"], chosen[:, None], layer.sm_scale, sink=inputs["sink"])
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_a_layer_decodes_by_its_rule():
    inputs = decode_inputs(TINY, 3, 2, 200)
    layer, lengths = dsa.Layer(TINY, adaptive=RULE, parallel=DataParallel()), torch.empty(3, 2, dtype=torch.int32)
    out, _, chosen = layer.decode(**inputs, chosen_lengths=lengths)
    again, _ = dsa.sparse_attention_paged(inputs["q"], inputs["kv_cache"], chosen, layer.sm_scale, sink=inputs["sink"])
    assert torch.equal(out, again)
    assert torch.equal(lengths, (chosen >= 0).sum(-1, dtype=torch.int32))


def test_what_a_layer_calls_can_be_warmed_up():
    wanted = list(adaptive.calls(RULE, TINY, Limits(max_queries=100, max_batch=8, max_context=4096)))
    assert {op.name for op, _, _ in wanted} == {"adapt", "select", "attention", "attention_paged"}
    assert {spec.output for op, spec, _ in wanted if op.name == "adapt"} == {"tokens", "slots"}
    assert all(spec.lengths for op, spec, _ in wanted if op.name.startswith("attention"))
    assert not [op.name for op, _, _ in adaptive.calls(RULE, TINY, Limits(0, 8)) if op is ops.get("attention")]


def test_refuses():
    call = scored()
    with pytest.raises(InputError, match=r"^chosen_lengths:"):
        dsa.index_select(*call, 64, adaptive=RULE)
    with pytest.raises(InputError, match=r"^chosen_lengths:"):
        dsa.index_select(*call, 64, chosen_lengths=torch.empty(13, dtype=torch.int32))
    with pytest.raises(InputError, match=r"^adaptive: got float"):
        dsa.index_select(*call, 64, adaptive=0.9, chosen_lengths=torch.empty(13, dtype=torch.int32))
    with pytest.raises(InputError, match=r"^adaptive.mass:"):
        dsa.index_select(*call, 64, adaptive=dsa.Adaptive(mass=torch.ones(4)))
    for rule in (0.5, dsa.Adaptive(mass=torch.ones(4))):
        with pytest.raises(InputError, match=r"^adaptive"):
            dsa.Layer(TINY, adaptive=rule)
    with pytest.raises(InputError, match=r"^adaptive: .*TensorParallel"):
        dsa.Layer(TINY, adaptive=RULE, parallel=TensorParallel())
    with pytest.raises(InputError, match=r"^chosen_lengths:"):
        dsa.Layer(TINY).prefill(**prefill_inputs(TINY, 5, 300), chosen_lengths=torch.empty(5, dtype=torch.int32))
