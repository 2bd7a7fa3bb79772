"""Every stage on the CPU, small: ours agrees with its reference, and what is wrong is found out."""

from __future__ import annotations

import functools

import pytest
import torch

from dsa_codegen.bench import agreement
from dsa_codegen.bench.cases import case
from dsa_codegen.bench.models import blocks_and_tail
from dsa_codegen.bench.peers import load
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.bench.stages import local_indices
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw

_INDEX = {"heads": 8, "head_dim": 64}
_DECODE = {"batch": 2, "next_n": 2, "context": 192, "page": 64}
_GROUPS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
SMALL = [
    case("index_prologue", "placed", {"tokens": 5, "page": 64, **_INDEX}),
    case("latent_prologue", "placed", {"tokens": 5, "head_dim": 576, "page": 64}),
    case("indexer_prefill", "causal", {"queries": 8, "context": 96, **_INDEX}),
    case("indexer_decode", "full", {**_DECODE, **_INDEX}),
    case("select", "relu", {"rows": 3, "context": 300, "k": 64}),
    case("select", "indexed", {"rows": 3, "context": 300, "k": 64}),
    case("index_select_prefill", "causal", {"queries": 8, "context": 160, "k": 64, **_INDEX}),
    case("index_select_decode", "full", {**_DECODE, "k": 64, **_INDEX}),
    case("attention_prefill", "random", {"queries": 3, "context": 200, "heads": 4, "head_dim": 576, "k": 64}),
    case("attention_prefill", "local", {"queries": 20, "context": 400, "heads": 4, "head_dim": 576, "k": 64}),
    case("attention_prefill", "fp8", {"queries": 3, "context": 200, "heads": 4, "head_dim": 576, "k": 64}),
    case("attention_prefill_paged", "random", {"queries": 3, "context": 192, "heads": 4, "head_dim": 576, "k": 64, "page": 64}),
    case("attention_prefill_paged", "local", {"queries": 20, "context": 384, "heads": 4, "head_dim": 576, "k": 64, "page": 64}),
    case("attention_decode", "random", {**_DECODE, "heads": 4, "head_dim": 576, "k": 64}),
    case("attention_decode", "local", {**_DECODE, "heads": 4, "head_dim": 576, "k": 64}),
    case("attention_decode", "random", {**_DECODE, "heads": 4, "head_dim": 512, "k": 64}),
    case("attention_backward", "causal", {"queries": 5, "context": 20, "heads": 4, "head_dim": 576, "k": 8}),
    case("attention_backward", "in order", {"queries": 3, "context": 20, "heads": 4, "head_dim": 576, "k": 8}),
    case("indexer_backward", "causal", {"queries": 5, "context": 20, "heads": 4, "head_dim": 576, "k": 8}),
    case("indexer_backward", "whole windows", {"queries": 5, "context": 20, "heads": 4, "head_dim": 576}),
    case("gqa_prefill", "random", {"queries": 3, "context": 192, "k": 64, "block": 16, **_GROUPS}),
    case("gqa_prefill", "local", {"queries": 6, "context": 192, "k": 64, "block": 16, **_GROUPS}),
    case("gqa_decode", "random", {**_DECODE, "k": 64, "block": 16, "page": 32, **_GROUPS}),
    case("model_prefill", "ax-k2", {"queries": 3, "context": 2100, "heads": 32, "head_dim": 160, "k": 2048}),
    case("model_prefill", "glm-5.3-flash", {"queries": 2, "context": 2200, "heads": 64, "head_dim": 512, "k": 2063}),
    case("model_decode", "hy4", {**_DECODE, "next_n": 1, "context": 1088, "heads": 32, "head_dim": 576, "k": 2048}),
    case("model_decode", "deepseek-v4.1", {**_DECODE, "next_n": 1, "context": 320, "heads": 64, "head_dim": 512, "k": 512}),
    case("layer_prefill", "real", {"queries": 5, "context": 150, "heads": 4, "head_dim": 576, "k": 64}),
    case("layer_decode", "real", {**_DECODE, "heads": 4, "head_dim": 576, "k": 64}),
    case("engine_prefill", "real", {"queries": 5, "context": 150, "heads": 4, "head_dim": 576, "k": 64}),
    case("engine_decode", "real", {**_DECODE, "heads": 4, "head_dim": 576, "k": 64}),
]


@pytest.mark.parametrize("each", SMALL, ids=lambda each: each.id)
def test_ours_agrees_with_the_reference(each):
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(1, "cpu"))
    prepared = stage.ours(each, inputs)
    outputs, reference = prepared.outputs(prepared.run()), stage.reference(each, inputs)
    for exact in (True, False):
        accuracy = stage.check(each, inputs, outputs, reference, exact)
        assert accuracy.passed, accuracy.detail
    first = next(iter(outputs))
    wrong = outputs[first].clone()
    wrong.flatten()[: wrong.numel() // 2] = 1
    assert not stage.check(each, inputs, {**outputs, first: wrong}, reference, exact=False).passed


@pytest.mark.parametrize("each", SMALL[:2], ids=lambda each: each.id)
def test_a_prologue_of_plain_operations_does_the_same(each):
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(1, "cpu"))
    reference = stage.reference(each, inputs)
    (peer,) = load(["dsa_codegen.bench.peers.unfused_prologue"])
    prepared = peer.prepare(each, inputs)
    outputs = prepared.outputs(prepared.run())
    accuracy = stage.check(each, inputs, outputs, reference, exact=False)
    assert accuracy.passed, accuracy.detail
    spec, stored = stage.part(each).spec, inputs["slots"]
    for found, expected in zip(
        spec.cache.unpack(inputs["cache"], stored), spec.cache.unpack(reference["cache"], stored), strict=True
    ):
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-3, atol=0.02)


@pytest.mark.parametrize("each", [each for each in SMALL if each.stage.startswith("gqa")], ids=lambda each: each.id)
def test_gathered_blocks_give_the_same(each):
    """And so do the requests that every peer of grouped queries is asked for."""
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(1, "cpu"))
    *_, peer = load(["dsa_codegen.bench.peers.unfused"])
    prepared = peer.prepare(each, inputs)
    accuracy = stage.check(each, inputs, prepared.outputs(prepared.run()), stage.reference(each, inputs), exact=False)
    assert accuracy.passed, accuracy.detail


MODELS = [each for each in SMALL if each.stage.startswith("model")]


@functools.cache
def problem(each):
    """Inputs of a case, and what comes of them."""
    inputs = stage_of(each.stage).inputs(each, Draw(1, "cpu"))
    return inputs, stage_of(each.stage).reference(each, inputs)


@pytest.mark.parametrize("each", MODELS, ids=lambda each: each.id)
def test_gathered_latents_give_the_same(each):
    """By plain operations, and by SDPA where it serves them."""
    stage, (inputs, reference) = stage_of(each.stage), problem(each)
    made = [peer.prepare(each, inputs) for peer in load(["dsa_codegen.bench.peers.gathered_latents"])]
    assert (made[0] is None) == (each.distribution != "ax-k2")
    for prepared in filter(None, made):
        accuracy = stage.check(each, inputs, prepared.outputs(prepared.run()), reference, exact=False)
        assert accuracy.similarity < 1e-4, (prepared.label, accuracy.detail)


def test_lists_of_pooled_keys_are_blocks_and_a_tail():
    model = presets.preset("glm-5.3-flash")
    lists, lengths = blocks_and_tail(Draw(1, "cpu"), 20, 4096, model)
    for row, (tokens, length) in enumerate(zip(lists.tolist(), lengths.tolist(), strict=True)):
        seen = 4096 - 20 + row + 1
        kept = [token for token in tokens[:length] if token >= 0]
        assert len(kept) == len(set(kept)) == 2048 + seen % 16 and max(kept) < seen
        assert set(tokens[length:]) <= {-1}
        assert kept[2048:] == list(range(seen - seen % 16, seen))


def test_a_selection_is_judged_by_its_scores():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, -torch.inf]])
    assert agreement.selection(torch.tensor([[2, 0]]), scores, 2, exact=True).passed
    assert agreement.selection(torch.tensor([[0, 3]]), scores, 2, exact=True).passed, "either of two equal scores"
    assert not agreement.selection(torch.tensor([[0, 1]]), scores, 2, exact=True).passed
    assert not agreement.selection(torch.tensor([[0, -1]]), scores, 2, exact=True).passed
    twice = agreement.selection(torch.tensor([[2, 2]]), scores, 2, exact=True)
    assert not twice.passed and "twice" in twice.detail


def test_a_short_row_wants_nothing_more_than_it_has():
    scores = torch.tensor([[3.0, -torch.inf, -torch.inf]])
    assert agreement.selection(torch.tensor([[0, -1, -1, -1]]), scores, 4, exact=True).passed


def test_slots_lead_back_to_their_tokens():
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    slots = torch.tensor([[8, 1, -1], [4, 15, 0]], dtype=torch.int32)
    assert agreement.tokens_of_slots(slots, table, 4).tolist() == [[0, 5, -1], [0, 7, -1]]


def test_local_indices_are_distinct_and_shared():
    chosen = local_indices(Draw(0, "cpu"), 20, 400, 40)
    assert all(len(set(row)) == 40 for row in chosen.tolist())
    shared = set(chosen[0].tolist()) & set(chosen[1].tolist())
    assert len(shared) == 32
    assert len(set(chosen[0].tolist()) & set(chosen[16].tolist())) < 32


def test_the_prompt_reference_is_the_decode_one():
    """It reads the whole cache back first, which the decode reference does token by token."""
    each = next(each for each in SMALL if each.stage == "attention_prefill_paged")
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(1, "cpu"))
    part, found = stage.part(each), stage.reference(each, inputs)
    for name, value in part.op.reference(part.spec, inputs).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_neighbours_are_the_new_queries_of_one_sequence():
    shape = {**_DECODE, "batch": 3, "next_n": 4, "heads": 4, "head_dim": 576, "k": 100}
    lists = stage_of("attention_decode").inputs(case("attention_decode", "local", shape), Draw(1, "cpu"))["indices"]
    for sequence in lists:
        first, *others = ({*row.tolist()} for row in sequence)
        assert [len(first & other) for other in others] == [80] * 3
    assert all(len({*row.tolist()}) == 100 for row in lists.flatten(0, 1))
    assert len({*lists[0, 0].tolist()} & {*lists[1, 0].tolist()}) < 80
