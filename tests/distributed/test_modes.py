"""A layer whose work ranks share gives what one rank gives: choices bit for bit, outputs within the limits of attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import distributed
from dsa_codegen.distributed import ContextParallel, DataParallel, Deal, TensorParallel
from dsa_codegen.errors import InputError
from dsa_codegen.problem.compare import ATTENTION, LSE, close

import exact_inputs
import rank_inputs
import ranks

WORLDS = pytest.mark.parametrize("world", rank_inputs.worlds(4))


def assert_equal(found, expected, tokens=None):
    """(out, lse, chosen) against those of one rank."""
    out, lse, chosen = found
    assert torch.equal(chosen, expected[2] if tokens is None else tokens)
    for what, value, one, limit in (("out", out, expected[0], ATTENTION), ("lse", lse, expected[1], LSE)):
        result = close(what, value, one, limit)
        assert result.passed, result.detail


@WORLDS
@pytest.mark.parametrize("tokens", rank_inputs.TOKENS)
def test_prefill_of_dealt_rows(results, world, tokens):
    whole = results[1][0]["modes"]["prefill", tokens]
    for name, deal in rank_inputs.deals(tokens, world).items():
        for rank in range(world):
            found = results[world][rank]["modes"]["context", tokens, name]
            assert_equal(found, [each[deal.rows(rank)] for each in whole])


@WORLDS
def test_deals_by_name_are_of_equal_parts(results, world):
    whole = results[1][0]["modes"]["prefill", 0]
    assert_equal(results[world][0]["modes"]["context", 0, "by name"], whole)


@WORLDS
def test_batch_invariant_rows_have_the_bits_of_one_rank(results, world):
    whole = results[1][0]["modes"]["invariant"]
    for rank in range(world):
        found, rows = results[world][rank]["modes"]["invariant", rank_inputs.TOKENS[0]]
        for name, value, expected in zip(("out", "lse", "chosen"), found, whole, strict=True):
            assert torch.equal(value, expected[rows]), (rank, name)


@WORLDS
@pytest.mark.parametrize("tokens", rank_inputs.TOKENS)
def test_heads_that_are_split(results, world, tokens):
    out, lse, chosen = results[1][0]["modes"]["prefill", tokens]
    for rank in range(world):
        heads = rank_inputs.heads_of(rank, world)
        assert_equal(results[world][rank]["modes"]["tensor", tokens], (out[:, heads], lse[:, heads], chosen))
    for batch, _ in rank_inputs.STEPS:
        out, lse, chosen = results[1][0]["modes"]["paged", batch]
        for rank in range(world):
            heads = rank_inputs.heads_of(rank, world)
            found = results[world][rank]["modes"]["tensor paged", batch]
            assert_equal(found, (out[..., heads, :], lse[..., heads], chosen))


@WORLDS
@pytest.mark.parametrize(("batch", "next_n"), rank_inputs.STEPS)
def test_decode_over_caches_that_are_sharded(results, world, batch, next_n):
    """Choices are tokens there, slots where one rank has all pages."""
    step = rank_inputs.decode_step(batch, next_n)
    expected = results[1][0]["modes"]["paged", batch]
    for rank in results[world]:
        out, lse, tokens = rank["modes"]["context paged", batch]
        slots = dsa.choice.slots_of(tokens.flatten(0, 1), step["page_table"], rank_inputs.PAGE).view(tokens.shape)
        assert_equal((out, lse, slots), expected)


@WORLDS
def test_ranks_with_other_sequences_and_with_none(results, world):
    for tokens in rank_inputs.TOKENS:
        for rank in results[world]:
            assert_equal(rank["modes"]["data", tokens], results[1][0]["modes"]["prefill", tokens])
    for batch, _ in rank_inputs.STEPS:
        expected = results[1][0]["modes"]["paged", batch]
        for rank in results[world]:
            assert_equal(rank["modes"]["data paged", batch], expected)
            own, first = rank["modes"]["data alone", batch]
            assert_equal(own, [each[first : first + len(own[0])] for each in expected])
    assert 0 in {len(rank["modes"]["data alone", 1][0][0]) for rank in results[world]}


def test_the_scores_are_exact_and_windows_are_short_and_long():
    step = rank_inputs.prefill_step(131)
    q8, folded = dsa.quantize_index_q(step["index_q"], step["index_weights"])
    assert torch.equal(q8.float(), step["index_q"].float()) and torch.equal(folded, step["index_weights"] / 16)
    seen = step["ends"] - step["starts"]
    assert seen.min() < rank_inputs.TOPK < seen.max()


def test_arguments_that_do_not_fit_are_named():
    for parallel, named in [("zigzag", "parallel"), (TensorParallel, "parallel")]:
        with pytest.raises(InputError, match=f"^{named}:"):
            dsa.Layer(rank_inputs.MODEL, parallel=parallel)
    with pytest.raises(InputError, match=r"^deal:.*zigzag"):
        ContextParallel("ring")
    step = rank_inputs.prefill_step(5)
    for parallel in (ContextParallel(), TensorParallel(), DataParallel([5])):
        with pytest.raises(InputError, match=r"^group:.*init_process_group"):
            dsa.Layer(rank_inputs.MODEL, parallel=parallel).prefill(**step)


def test_a_decode_step_of_few_keys_is_scored_by_every_rank():
    """Without a group nothing can be exchanged: it is asked for where there are many, and where bounds are stated."""
    step = rank_inputs.decode_step(2, 1)
    assert_equal(
        dsa.Layer(rank_inputs.MODEL, parallel=TensorParallel()).decode(**step), dsa.Layer(rank_inputs.MODEL).decode(**step)
    )
    for parallel in (TensorParallel(least=2 * rank_inputs.CONTEXT), TensorParallel(bounds=[0, 2])):
        with pytest.raises(InputError, match=r"^group:"):
            dsa.Layer(rank_inputs.MODEL, parallel=parallel).decode(**step)


@pytest.fixture
def alone():
    """A group of one, in this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def tokens_of(slots):
    """The tokens of two sequences that lie in slots."""
    table = rank_inputs.decode_step(2, 1)["page_table"]
    held = slots[..., None] // rank_inputs.PAGE == table[:, None, None]
    return torch.where(slots >= 0, held.int().argmax(-1) * rank_inputs.PAGE + slots % rank_inputs.PAGE, -1).int()


@pytest.mark.usefixtures("alone")
def test_a_group_of_one():
    whole = dsa.Layer(rank_inputs.MODEL).prefill(**rank_inputs.prefill_step(70))
    for parallel in (ContextParallel(), ContextParallel("interleaved"), TensorParallel(), DataParallel([70]), DataParallel()):
        assert_equal(dsa.Layer(rank_inputs.MODEL, parallel=parallel).prefill(**rank_inputs.prefill_step(70)), whole)
    kept = replace(rank_inputs.MODEL, keep_first=3, keep_recent=9)
    one, alike = dsa.Layer(kept), dsa.Layer(kept, parallel=ContextParallel())
    out, lse, slots = one.decode(**rank_inputs.decode_step(2, 1))
    assert_equal(alike.decode(**rank_inputs.decode_step(2, 1)), (out, lse), tokens_of(slots))
    whole = dsa.Layer(rank_inputs.MODEL).decode(**rank_inputs.decode_step(2, 1))
    for parallel in (TensorParallel(), DataParallel([2]), DataParallel()):
        assert_equal(dsa.Layer(rank_inputs.MODEL, parallel=parallel).decode(**rank_inputs.decode_step(2, 1)), whole)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "parallel", [ContextParallel(), TensorParallel(), DataParallel()], ids=lambda each: type(each).__name__
)
def test_a_layers_warmup_covers_what_its_ranks_call(parallel, covers):
    layer = dsa.Layer(rank_inputs.MODEL, parallel=parallel)
    prefill, decode = rank_inputs.prefill_step(50), rank_inputs.decode_step(1, 1)

    def steps():
        layer.prefill(**prefill)
        layer.decode(**decode)

    covers(lambda: layer.warmup(max_queries=64, max_batch=4, max_context=rank_inputs.CONTEXT, next_n=(1, 2)), steps)


@pytest.mark.usefixtures("alone")
def test_rows_that_do_not_fit_are_named_before_anything_is_sent():
    step = rank_inputs.prefill_step(6)
    with pytest.raises(InputError, match=r"^local: got 6 rows"):
        dsa.Layer(rank_inputs.MODEL, parallel=ContextParallel(Deal.zigzag(7, 1))).prefill(**step)
    with pytest.raises(InputError, match=r"^deal: got one for 2 ranks"):
        dsa.Layer(rank_inputs.MODEL, parallel=ContextParallel(Deal.zigzag(6, 2))).prefill(**step)
    with pytest.raises(InputError, match=r"^counts:"):
        dsa.Layer(rank_inputs.MODEL, parallel=DataParallel([5])).prefill(**step)
    inputs = exact_inputs.paged(3, 1, 100)
    with pytest.raises(InputError, match=r"^bounds:"):
        distributed.index_select_paged_by_rows(**inputs, topk=64, bounds=[0, 4])
    with pytest.raises(InputError, match=r"^page_table: got 2 rows"):
        distributed.index_select_paged_by_rows(**{**inputs, "page_table": inputs["page_table"][:2]}, topk=64)
    with pytest.raises(InputError, match=r"^out:"):
        distributed.index_select_paged_by_rows(**inputs, topk=64, out=torch.empty(1))


@pytest.fixture(scope="module")
def of_eight(of_the_run):
    """As ``results``, of as many ranks as a node has GPUs; of some cases most ranks have nothing."""
    return ranks.computed(of_the_run / "eight", 8)


@pytest.mark.slow
@pytest.mark.parametrize("world", [5, 6, 7, 8])
def test_more_processes(of_eight, world):
    found, whole = of_eight[world], of_eight[1][0]
    for rank in found:
        for name, chosen in rank["rows"].items():
            assert torch.equal(chosen, whole["rows"][name])
        for (name, *which), attended in rank["position"].items():
            if name == "dealt":
                assert torch.equal(attended, whole["position"][which[1], 0, False][0])
            elif name != "own heads":
                tokens, out, lse = whole["position"][tuple(which)]
                assert_equal((*attended[1:], attended[0]), (out, lse, tokens))
        for (out, chosen), (wanted, tokens) in zip(rank["modules"]["blocks"], whole["modules", True], strict=True):
            assert torch.equal(chosen, tokens)
            torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2e-3)
    for tokens in rank_inputs.TOKENS:
        one = whole["modes"]["prefill", tokens]
        for name, deal in rank_inputs.deals(tokens, world).items():
            for rank in range(world):
                assert_equal(found[rank]["modes"]["context", tokens, name], [each[deal.rows(rank)] for each in one])
