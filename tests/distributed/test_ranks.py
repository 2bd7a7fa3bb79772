"""Two to four processes over gloo choose what one does, bit for bit, and attend to it within the limits of attention."""

from __future__ import annotations

import functools

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import distributed
from dsa_codegen.errors import InputError
from dsa_codegen.problem.compare import ATTENTION, LSE, close

import deepseek_layer
import exact_inputs
import rank_inputs

WORLDS = pytest.mark.parametrize("world", rank_inputs.worlds(4))


@WORLDS
@pytest.mark.parametrize("number", range(len(rank_inputs.KEEP)))
@pytest.mark.parametrize(("queries", "tokens"), rank_inputs.ROWS)
def test_rows_dealt_out_are_chosen_alike(results, world, queries, tokens, number):
    expected = dsa.index_select(**exact_inputs.prefill(queries, tokens), topk=rank_inputs.TOPK, **rank_inputs.KEEP[number])
    for rank in results[world]:
        assert torch.equal(rank["rows"][queries, number], expected)


@WORLDS
def test_bounds_of_the_caller_leave_ranks_without_rows(results, world):
    expected = dsa.index_select(**exact_inputs.prefill(26, 300), topk=rank_inputs.TOPK)
    for rank in results[world]:
        assert torch.equal(rank["rows"]["bounds"], expected)


@WORLDS
@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize(("batch", "next_n"), rank_inputs.STEPS)
def test_sequences_dealt_out_are_chosen_alike(results, world, batch, next_n, slots):
    inputs = exact_inputs.paged(batch, next_n, rank_inputs.CONTEXT, rank_inputs.PAGE)
    expected = dsa.index_select_paged(**inputs, topk=rank_inputs.TOPK, slots=slots, **rank_inputs.KEEP[1])
    for rank in results[world]:
        assert torch.equal(rank["rows"]["paged", batch, slots], expected)


@functools.cache
def by_one_rank(batch: int, next_n: int, number: int, with_sink: bool) -> tuple[torch.Tensor, ...]:
    """(tokens, out, lse) of the whole caches."""
    inputs, kv_cache, q, sink = rank_inputs.attended(batch, next_n)
    choose = functools.partial(dsa.index_select_paged, **inputs, topk=rank_inputs.TOPK, **rank_inputs.KEEP[number])
    attended = dsa.sparse_attention_paged(q, kv_cache, choose(), 576**-0.5, sink=sink if with_sink else None)
    return choose(slots=False), *attended


@WORLDS
@pytest.mark.parametrize("name", ["tokens", "pages", "stretches"])
@pytest.mark.parametrize("number", range(len(rank_inputs.KEEP)))
@pytest.mark.parametrize(("batch", "next_n"), rank_inputs.STEPS)
def test_a_cache_sharded_by_position_serves_alike(results, world, name, batch, next_n, number):
    for with_sink in (False, True):
        tokens, out, lse = by_one_rank(batch, next_n, number, with_sink)
        first = results[world][0]["position"][name, batch, number, with_sink]
        for rank in results[world]:
            merged = rank["position"][name, batch, number, with_sink]
            assert torch.equal(merged[0], tokens)
            assert all(torch.equal(a, b) for a, b in zip(merged, first, strict=True))
            for what, value, one, limit in (("out", merged[1], out, ATTENTION), ("lse", merged[2], lse, LSE)):
                result = close(what, value, one, limit)
                assert result.passed, result.detail


@WORLDS
@pytest.mark.parametrize("name", ["tokens", "pages", "stretches"])
def test_candidates_may_be_merged_by_some_rows_of_each_rank(results, world, name):
    """Also where rows are fewer than ranks, or none."""
    for batch, _ in rank_inputs.STEPS:
        tokens = by_one_rank(batch, dict(rank_inputs.STEPS)[batch], 0, False)[0]
        assert all(torch.equal(rank["position"]["dealt", name, batch], tokens) for rank in results[world])


@pytest.mark.parametrize("world", [world for world in rank_inputs.worlds(4) if not deepseek_layer.HEADS % world])
def test_a_module_with_its_heads_split_gives_what_the_whole_one_does(results, world):
    expected = deepseek_layer.steps_of_module()
    for rank in results[world]:
        assert torch.equal(rank["module"], results[world][0]["module"])
        # Products of other shapes are summed in another order, and rounded to BF16 before attention.
        torch.testing.assert_close(rank["module"], expected, rtol=2**-7, atol=2e-3)


@WORLDS
def test_ranks_may_want_their_own_heads_only(results, world):
    """The same results, of fewer heads."""
    ours = [rank["position"] for rank in results[world]]
    names = [name for name in ours[0] if name[0] == "own heads"]
    assert names if rank_inputs.HEADS % world == 0 else not names
    for _, *which in names:
        for number, rank in enumerate(ours):
            heads = rank_inputs.heads_of(number, world)
            out, lse = rank[("own heads", *which)]
            _, whole, total = rank[(*which, True)]
            # A CPU takes logarithms of four numbers in another way than those left over.
            torch.testing.assert_close(lse, total[..., heads], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(out, whole[..., heads, :], rtol=2**-7, atol=1e-6)


def test_the_cases_have_ties_at_the_threshold_and_short_rows():
    """What makes the comparisons above hard is there."""
    inputs = exact_inputs.paged(5, 2, rank_inputs.CONTEXT, rank_inputs.PAGE)
    logits = dsa.indexer_logits_paged(**inputs, clean=True)
    threshold = logits.sort(dim=1, descending=True).values[:, rank_inputs.TOPK - 1]
    long = inputs["lengths"].flatten() > rank_inputs.TOPK
    assert ((logits == threshold[:, None]).sum(1)[long] > 1).any()
    windows = exact_inputs.prefill(26, 300)
    assert ((windows["ends"] - windows["starts"]) < rank_inputs.TOPK).any()


def test_without_a_group_it_is_said():
    with pytest.raises(InputError, match=r"^group:.*init_process_group"):
        distributed.index_select_by_rows(**exact_inputs.prefill(3, 40), topk=rank_inputs.TOPK)
