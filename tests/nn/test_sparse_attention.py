"""The module: equal to transformers' layer, to itself in chunks and step by step, and it scores nothing where all is chosen."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import nn
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.problem import checks
from dsa_codegen.problem.compare import similarity_gap
from dsa_codegen.problem.presets import Model
from dsa_codegen.runtime import dispatch

import deepseek_layer as deepseek

TINY = Model("small", 2, 512, 64, 8, 64, 64)
SHAPE = nn.Shape(hidden=96, q_rank=48, d_head=32, d_v=24)
TABLE = nn.rotary_table(512, 64)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(3)
    return nn.SparseAttention(TINY, SHAPE)


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(2, 160, SHAPE.hidden, generator=torch.Generator().manual_seed(5)).bfloat16()


def run(layer, hidden, chunks, next_ns=(), **cache):
    """Outputs of all sequences, prefilled in chunks, then decoded, each token's by its place."""
    batch = len(hidden)
    caches = nn.PagedCache(layer.model, TABLE, layers=1, blocks=8, batch=batch, max_context=256, **cache)
    outs = torch.full((batch, hidden.shape[1], hidden.shape[2]), torch.nan)
    for counts, next_n in [*((counts, 0) for counts in chunks), *((None, next_n) for next_n in next_ns)]:
        before = list(caches.held)
        step = caches.decode(next_n) if next_n else caches.prefill(counts)
        places = [(row, token) for row, held in enumerate(caches.held) for token in range(before[row], held)]
        rows, tokens = torch.tensor(places).T
        outs[rows, tokens] = layer(hidden[rows, tokens], caches.layers[0], step).float()
    return outs


@pytest.mark.parametrize(
    "cache",
    [{}, {"scores": "bf16"}, {"plain": torch.bfloat16, "scores": "bf16"}],
    ids=["fp8", "bf16 keys", "bf16"],
)
def test_chunks_and_steps_give_what_a_whole_prompt_does(layer, hidden, cache):
    whole = run(layer, hidden, [(90, 70)], **cache)
    assert whole.isfinite().all(-1).sum(1).tolist() == [90, 70]
    chunked = run(layer, hidden, [(50, 40), (20, 0), (20, 30)], **cache)
    stepwise = run(layer, hidden, [(86, 66)], [1, 3], **cache)
    for other in (chunked, stepwise):
        assert torch.equal(other.nan_to_num(), whole.nan_to_num())


@pytest.mark.parametrize("cache", [{}, {"plain": torch.float32, "scores": "bf16"}], ids=["fp8", "fp32"])
def test_a_batch_invariant_row_has_the_same_bits_alone(hidden, cache):
    """In fp32, where products of torch tell batches apart; caches, prefill in chunks and decode."""
    torch.manual_seed(3)
    layer = nn.SparseAttention(replace(TINY, batch_invariant=True), SHAPE, dtype=torch.float32)
    hidden = hidden.float()
    together = run(layer, hidden, [(70, 66)], [1], **cache)
    for sequence, chunks in enumerate(([(50,), (20,)], [(66,)])):
        alone = run(layer, hidden[sequence, None], chunks, [1], **cache)
        assert torch.equal(alone[0].nan_to_num(), together[sequence].nan_to_num())


def test_a_cache_of_fp8_is_close_to_one_of_bf16(layer, hidden):
    short = hidden[:, :60]
    fp8, bf16 = (run(layer, short, [(60, 60)], **cache) for cache in ({}, {"plain": torch.bfloat16}))
    assert similarity_gap(fp8, bf16) < 2e-3


def counted(call):
    """The operations that ran, by name."""
    dispatch.reset()
    call()
    return {name.partition(":")[0]: count for name, count in dsa.stats().items()}


PREFILLED = {"index_prologue": 1, "latent_prologue": 1, "gather_paged": 1, "attention": 1}
DECODED = {"index_prologue": 1, "latent_prologue": 1, "attention_paged": 1}
SCORED = {"indexer": 1, "select": 1, "gather_paged": 2}


def test_windows_no_longer_than_topk_are_neither_scored_nor_selected(layer, hidden):
    caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=8, batch=2, max_context=256)
    cache = caches.layers[0]

    def step(made, tokens):
        return counted(lambda: layer(hidden[0, :tokens], cache, made))

    assert step(caches.prefill((60, 50)), 110) == PREFILLED
    assert step(caches.decode(4), 8) == DECODED
    assert caches.held == [64, 54]
    assert step(caches.decode(1), 2) == {**DECODED, "indexer_paged": 1, "select": 1}
    assert step(caches.prefill((1, 30)), 31) == {**PREFILLED, **SCORED}


def test_a_short_step_attends_to_what_a_selection_would_have_chosen(layer, hidden):
    """The same step, once with its windows as they are and once scored and selected."""
    for whole in (lambda caches: caches.prefill((40, 23)), lambda caches: caches.decode(1)):
        caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=8, batch=2, max_context=256)
        layer(hidden[0, :20], caches.layers[0], caches.prefill((10, 10)))
        step = whole(caches)
        tokens = hidden[1, : len(step.positions)]
        short = layer(tokens, caches.layers[0], step)
        assert step.chosen is not None
        assert torch.equal(layer(tokens, caches.layers[0], step._replace(chosen=None)), short)


def made_of_its_weights(**options):
    model = Model("v3.2", deepseek.HEADS, 512, 64, deepseek.INDEX_HEADS, deepseek.INDEX_DIM, deepseek.TOPK)
    shape = nn.Shape(deepseek.HIDDEN, deepseek.Q_RANK, deepseek.D_HEAD, deepseek.D_V)
    layer = nn.SparseAttention(model, shape, dtype=torch.float32, **options)
    layer.load_state_dict(deepseek.state())
    return layer


@pytest.fixture(scope="module")
def expected():
    return {name: torch.from_numpy(value) for name, value in np.load(deepseek.FIXTURE).items()}


def test_equals_the_layer_of_transformers(expected):
    """With the tokens that it chose: FP8 scores choose others where two score alike, and these must be the same."""
    layer, x = made_of_its_weights(), deepseek.hidden()
    caches = nn.PagedCache(layer.model, TABLE, layers=1, blocks=4, batch=1, max_context=256, plain=torch.bfloat16)
    step = caches.prefill((deepseek.TOKENS,))
    own = layer.indexer(x, layer.q_a_layernorm(layer.q_a_proj(x)), caches.layers[0], step)
    common = [
        len(set(a.tolist()) & set(b.tolist()) - {-1}) / int((b >= 0).sum())
        for a, b in zip(own, expected["chosen"], strict=True)
    ]
    assert all(share == 1 for share in common[: deepseek.TOPK])
    assert min(common) > 0.85 and sum(common) / len(common) > 0.95
    out = layer(x, caches.layers[0], step._replace(chosen=expected["chosen"].int()))
    assert similarity_gap(out, expected["out"]) < 2e-5
    torch.testing.assert_close(out, expected["out"], rtol=0.02, atol=0.02 * expected["out"].abs().max().item())


@pytest.mark.parametrize(("prefilled", "next_n"), [(deepseek.TOKENS, 0), (136, 2)], ids=["prefill", "decode"])
def test_unquantised_in_fp32_chooses_and_computes_what_transformers_does(expected, prefilled, next_n):
    layer, x = made_of_its_weights(), deepseek.hidden()
    table = nn.rotary_table(256, 64)
    caches = nn.PagedCache(layer.model, table, layers=1, blocks=4, batch=1, plain=torch.float32, scores="bf16")
    outs, chosen = [], []
    layer.indexer.register_forward_hook(lambda module, args, result: chosen.append(result))
    for count in (prefilled - 40, 40, *(2 for _ in range((deepseek.TOKENS - prefilled) // 2))):
        step = caches.decode(next_n) if count == next_n else caches.prefill((count,))
        outs.append(layer(x[caches.held[0] - count : caches.held[0]], caches.layers[0], step))
    assert torch.equal(torch.cat(chosen), expected["chosen"].int())
    torch.testing.assert_close(torch.cat(outs), expected["out"], rtol=1e-4, atol=1e-4)


def test_short_prompts_equal_transformers_with_our_own_choice(expected):
    """Causal, so that its first tokens are those of a shorter prompt, of which everything is chosen."""
    layer, short = made_of_its_weights(), deepseek.TOPK
    caches = nn.PagedCache(layer.model, TABLE, layers=1, blocks=4, batch=1, max_context=256, plain=torch.bfloat16)
    out = layer(deepseek.hidden()[:short], caches.layers[0], caches.prefill((short,)))
    assert similarity_gap(out, expected["out"][:short]) < 2e-5


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_the_fixture_is_what_transformers_computes(expected):
    for name, value in deepseek.by_transformers().items():
        torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"hadamard": True}, {"index_rotary": "interleaved"}, {"power_of_two": True}], ids=str)
def test_options_of_the_indexer_choose_nearly_the_same(options, hidden):
    """The rotation and rounded scales change scores by rounding only; the other pairing of channels changes them."""
    choices = []
    for each in ({}, options):
        torch.manual_seed(3)
        layer = nn.SparseAttention(TINY, nn.Shape(96, 48, 32, 24, **each))
        caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=8, batch=2, max_context=256)
        q_low = layer.q_a_layernorm(layer.q_a_proj(hidden[0]))
        choices.append(layer.indexer(hidden[0], q_low, caches.layers[0], caches.prefill((160, 0)))[100:].tolist())
    common = [len(set(a) & set(b)) / TINY.topk for a, b in zip(*choices, strict=True)]
    assert (sum(common) / len(common) > 0.95) == ("index_rotary" not in options)
    assert choices[0] != choices[1]


def test_tokens_that_a_model_keeps_are_chosen(hidden):
    torch.manual_seed(3)
    layer = nn.SparseAttention(replace(TINY, keep_first=2, keep_recent=9), SHAPE)
    chosen = []
    layer.indexer.register_forward_hook(lambda module, args, result: chosen.append(result))
    caches = nn.PagedCache(layer.model, TABLE, layers=1, blocks=3, batch=1, max_context=256)
    layer(hidden[0, :120], caches.layers[0], caches.prefill((120,)))
    layer(hidden[0, 120:121], caches.layers[0], caches.decode())  # its pages are the first, so that slots are tokens
    for row, last in ((chosen[0][-1], 119), (chosen[1][0], 120)):
        assert {0, 1, *range(last - 8, last + 1)} <= set(row.tolist())


def test_sinks_take_their_share(hidden):
    model = Model("sinks", 2, 512, 64, 8, 64, 64, attn_sink=True)
    torch.manual_seed(3)
    layer = nn.SparseAttention(model, SHAPE)
    plain = run(layer, hidden, [(20, 20)])[:, :20]
    with torch.no_grad():
        layer.sinks.fill_(torch.inf)
    assert not run(layer, hidden, [(20, 20)])[:, :20].any()
    with torch.no_grad():
        layer.sinks.fill_(-torch.inf)
    assert not torch.equal(run(layer, hidden, [(20, 20)])[:, :20], plain)


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (SpecError, lambda: nn.Shape(hidden=0, q_rank=8)),
        (SpecError, lambda: nn.Shape(hidden=8, q_rank=8, rotary="none")),
        (InputError, lambda: nn.SparseAttention(dsa.preset("deepseek-v4-flash"), SHAPE)),
        (InputError, lambda: nn.SparseAttention(dsa.preset("deepseek-v3.2-bf16-tp8"), SHAPE)),
        (InputError, lambda: nn.PagedCache(TINY, TABLE, layers=1, blocks=1, batch=2, max_context=256).prefill((40, 40))),
        (InputError, lambda: nn.PagedCache(TINY, TABLE, layers=1, blocks=9, batch=1, max_context=64).prefill((65,))),
        (InputError, lambda: nn.PagedCache(TINY, TABLE, layers=1, blocks=1, batch=2, max_context=64).prefill((1,))),
        (InputError, lambda: nn.PagedCache(TINY, TABLE, layers=1, blocks=9, batch=1, max_context=513)),
        (InputError, lambda: nn.PagedCache(TINY, TABLE, layers=1, blocks=1, batch=1, max_context=64).rewind((1,))),
    ],
)
def test_refuses(error, make):
    with pytest.raises(error):
        make()


def test_pages_come_back_and_drafts_are_forgotten(layer, hidden):
    caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=3, batch=2, max_context=256)
    caches.prefill((100, 60))
    caches.release(0)
    assert (caches.held, caches.lengths.tolist()) == ([0, 60], [0, 60])
    caches.decode(3)  # the empty place takes no part
    assert (caches.held, caches.lengths.tolist()) == ([0, 63], [0, 63])
    caches.rewind((0, 2))
    assert (caches.held, caches.lengths.tolist()) == ([0, 61], [0, 61])
    step = caches.prefill((128, 0))
    assert step.slots.unique().numel() == 128
    assert not set((step.slots // 64).tolist()) & {int(caches.page_table[1, 0])}


def test_an_empty_place_stores_nothing_in_a_decode_step(layer, hidden):
    caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=4, batch=2, max_context=256)
    layer(hidden[0, :70], caches.layers[0], caches.prefill((70, 0)))
    before = caches.layers[0].kv.clone()
    step = caches.decode(1)
    out = layer(hidden[:, 70], caches.layers[0], step)
    assert step.slots.tolist()[1] == -1
    assert not out[1].any()
    changed = (caches.layers[0].kv != before).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[int(caches.page_table[0, 1]), 6]]


@pytest.mark.parametrize("next_n", [0, 2], ids=["prefill", "decode"])
def test_a_layer_is_traced_whole(layer, hidden, next_n, monkeypatch):
    monkeypatch.setattr(checks, "_ALIGNED", "cpu")  # a trace cannot ask for addresses, which CUDA tensors are asked for
    torch._dynamo.reset()
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    results = []
    for call in (layer, traced):
        caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=8, batch=2, max_context=256)
        layer(hidden[:, :75].flatten(0, 1), caches.layers[0], caches.prefill((75, 75)))
        step = caches.decode(next_n) if next_n else caches.prefill((5, 7))
        results.append(call(hidden[0, : len(step.positions)], caches.layers[0], step))
    assert torch.equal(*results)
