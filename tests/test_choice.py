"""Indexer and selection in one call: the unfused pair's choice, whatever the chunks, in memory that the budget bounds."""

from __future__ import annotations

import weakref

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import choice, functions
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw

import exact_inputs

TOPK = 64
ROW = 4 * 384  # bytes of a row of logits of 300 columns
OPTIONS = [
    {},
    {"score": "relu_bias", "logits": "bf16"},
    {"keep_first": 3, "keep_recent": 9},
]


def pair(inputs: dict, *, score="weighted_relu", logits="fp32", **options) -> torch.Tensor:
    """The two calls that ``index_select`` stands for."""
    made = dsa.indexer_logits(**inputs, score=score, logits=logits, clean=True)
    return dsa.select(made, inputs["ends"], TOPK, starts=inputs["starts"], **options)


@pytest.mark.parametrize("budget", [1 << 30, 8 * ROW, 1], ids=["whole", "eight", "four"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_pair_in_any_chunks(options, budget):
    inputs = exact_inputs.prefill(26, 300)
    chosen = dsa.index_select(**inputs, topk=TOPK, max_bytes=budget, **options)
    assert torch.equal(chosen, pair(inputs, **options))


@pytest.mark.parametrize("requests", [2, 13, 26])
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_slots_where_a_chunk_ends_inside_a_request(requests, budget):
    inputs = exact_inputs.prefill(26, 300)
    table = torch.randperm(requests * 16, generator=torch.Generator().manual_seed(1)).view(requests, 16).int()
    table[:, 5] = -1
    slots = {"page_table": table, "page": 16}  # 256 of the 300 tokens
    expected = pair(inputs, **slots)
    scores = torch.empty(26, TOPK)
    assert torch.equal(dsa.index_select(**inputs, topk=TOPK, max_bytes=budget, **slots), expected)
    scored = dsa.index_select(**inputs, topk=TOPK, max_bytes=budget, chosen_scores=scores, **slots)
    assert torch.equal(scored, expected)


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_scores_of_the_chosen(budget):
    inputs = exact_inputs.prefill(9, 300)
    scores, out = torch.full((9, TOPK), torch.nan), torch.full((9, TOPK), 7, dtype=torch.int32)
    chosen = dsa.index_select(**inputs, topk=TOPK, max_bytes=budget, out=out, chosen_scores=scores)
    assert chosen.data_ptr() == out.data_ptr() and torch.equal(chosen, pair(inputs))
    logits = dsa.indexer_logits(**inputs, clean=True)
    assert torch.equal(scores[chosen >= 0], logits.gather(1, chosen.clamp(min=0).long())[chosen >= 0])
    assert (scores[chosen < 0] == -torch.inf).all() and (chosen < 0).any()


@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("budget", [1 << 30, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_paged_is_the_pair_in_any_chunks(options, budget, next_n):
    inputs = exact_inputs.paged(10, next_n, 290)
    scoring = {name: options[name] for name in ("score", "logits") if name in options}
    keep = {name: options[name] for name in ("keep_first", "keep_recent") if name in options}
    starts = (inputs["lengths"] // 4).int()
    logits = dsa.indexer_logits_paged(**inputs, clean=True, **scoring)
    ends, begins = inputs["lengths"].flatten(), starts.flatten()
    for slots, table in ((True, {"page_table": inputs["page_table"], "page": 16}), (False, {})):
        expected = dsa.select(logits, ends, TOPK, starts=begins, **table, **keep).view(10, next_n, TOPK)
        call = {**inputs, "topk": TOPK, "slots": slots, "starts": starts, "max_bytes": budget, **options}
        scores = torch.empty(10, next_n, TOPK)
        assert torch.equal(dsa.index_select_paged(**call), expected)
        assert torch.equal(dsa.index_select_paged(**call, chosen_scores=scores), expected)
        assert scores.isfinite().any() and torch.equal(scores.isfinite(), expected >= 0)


def test_tokens_end_where_the_page_table_does():
    inputs = exact_inputs.paged(3, 1, 290)
    inputs["lengths"][:] = 290
    inputs["page_table"] = inputs["page_table"][:, :2].contiguous()
    chosen = dsa.index_select_paged(**inputs, topk=TOPK, slots=False)
    assert torch.equal(chosen[0, 0, :32], torch.arange(32, dtype=torch.int32))
    assert (chosen[:, :, 32:] == -1).all()


@pytest.mark.parametrize("tokens", [1000, 30000])
def test_memory_is_the_budget_at_any_context(tokens, monkeypatch):
    """Logits of one chunk at a time are alive, and they take no more than was allowed."""
    made, sizes, compute = [], [], functions.indexer_logits
    budget = 16 * 4 * 30080

    def watched(*args, **options):
        assert all(logits() is None for logits in made)
        logits = compute(*args, **options)
        made.append(weakref.ref(logits))
        sizes.append(logits.untyped_storage().nbytes())
        return logits

    monkeypatch.setattr(functions, "indexer_logits", watched)
    chosen = dsa.index_select(**exact_inputs.prefill(50, tokens), topk=TOPK, max_bytes=budget)
    assert chosen.shape == (50, TOPK)
    assert max(sizes) <= budget
    assert len(sizes) == (1 if tokens == 1000 else 4)


@pytest.mark.parametrize("queries", [0, 1])
def test_few_rows_and_no_tokens(queries):
    inputs = exact_inputs.prefill(queries, 0)
    scores = torch.empty(queries, TOPK)
    assert (dsa.index_select(**inputs, topk=TOPK, chosen_scores=scores) == -1).all()
    assert (scores == -torch.inf).all()


def refuse(*args, **options):
    raise AssertionError("launched")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topk": 0}, SpecError),
        ({"topk": "64"}, "topk"),
        ({"keep_first": 60, "keep_recent": 9}, SpecError),
        ({"max_bytes": None}, "max_bytes"),
        ({"out": torch.empty(26, 32, dtype=torch.int32)}, "out"),
        ({"chosen_scores": torch.empty(26, TOPK, dtype=torch.bfloat16)}, "chosen_scores"),
        ({"page_table": torch.zeros(7, 4, dtype=torch.int32)}, "page_table"),
        ({"k_scale": torch.ones(3)}, "k_scale"),
        ({"starts": None}, "starts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named_before_a_launch(change, named, monkeypatch):
    monkeypatch.setattr(functions, "indexer_logits", refuse)
    error, message = (InputError, f"^{named}:") if isinstance(named, str) else (named, "is not possible")
    with pytest.raises(error, match=message):
        dsa.index_select(**{**exact_inputs.prefill(26, 300), "topk": TOPK, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topk": 0}, SpecError),
        ({"slots": 1}, "slots"),
        ({"starts": torch.zeros(10, dtype=torch.int32)}, "starts"),
        ({"out": torch.empty(10, TOPK, dtype=torch.int32)}, "out"),
        ({"q": None}, "q"),
        ({"max_context": "long"}, "max_context"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_paged_mistakes_are_named_before_a_launch(change, named, monkeypatch):
    monkeypatch.setattr(functions, "indexer_logits_paged", refuse)
    error, message = (InputError, f"^{named}:") if isinstance(named, str) else (named, "is not possible")
    with pytest.raises(error, match=message):
        dsa.index_select_paged(**{**exact_inputs.paged(10, 1, 290), "topk": TOPK, **change})


@pytest.mark.parametrize("budget", [1 << 30, 8 * ROW])
def test_traces_whole(budget):
    """``torch.compile`` finds one graph, in one chunk and in several."""
    inputs = {**exact_inputs.prefill(18, 300), "topk": TOPK, "max_bytes": budget}
    traced = torch.compile(dsa.index_select, fullgraph=True, backend="eager")
    assert torch.equal(traced(**inputs), dsa.index_select(**inputs))
    steps = {**exact_inputs.paged(6, 2, 290), "topk": TOPK, "max_bytes": budget}
    traced = torch.compile(dsa.index_select_paged, fullgraph=True, backend="eager")
    assert torch.equal(traced(**steps), dsa.index_select_paged(**steps))


def test_slots_of_is_what_select_writes():
    tokens = torch.tensor([[0, 17, -1], [40, 3, 16]], dtype=torch.int32)
    table = torch.tensor([[4, 1, -1]], dtype=torch.int32)
    assert choice.slots_of(tokens, table, 16).tolist() == [[64, 17, -1], [-1, 67, 16]]
    assert choice.slots_of(tokens, table[:, :0], 16).eq(-1).all()


GB = 1 << 30


def peak_of(call):
    """What a call gives, and the most that was allocated meanwhile, its arguments among it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = call()
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated()


def many_keys(draw, tokens):
    """e4m3 keys and their scales, drawn in parts: what bf16 ones would take is no part of the call."""
    parts = [dsa.quantize_index_k(draw.normal(tokens // 16, 128, dtype=torch.bfloat16)) for _ in range(16)]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_a_million_tokens_and_4096_queries_take_2_gb():
    draw, tokens, queries = Draw(8, "cuda"), 1 << 20, 4096
    keys, scales = many_keys(draw, tokens)
    q, weights = draw.normal(queries, 64, 128, dtype=torch.float8_e4m3fn), draw.normal(queries, 64)
    ends = torch.arange(tokens - queries + 1, tokens + 1, dtype=torch.int32, device="cuda")
    call = q, keys, scales, weights, torch.zeros_like(ends), ends
    chosen, peak = peak_of(lambda: dsa.index_select(*call, 2048))
    assert peak <= 2 * GB, f"{peak / GB:.2f} GB"
    rows = slice(768, 1024)  # one of 16 chunks of 256
    few = dsa.indexer_logits(q[rows], keys, scales, weights[rows], call[4][rows], ends[rows])
    assert torch.equal(chosen[rows], dsa.select(few, ends[rows], 2048, starts=call[4][rows]))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_a_million_tokens_of_many_sequences_take_2_gb():
    """512 sequences that share their pages: 2 GB of logits by themselves."""
    draw, tokens, batch = Draw(9, "cuda"), 1 << 20, 512
    layout = IndexKLayout(64, 128)
    cache = layout.empty(tokens // 64, "cuda")
    layout.pack(cache, torch.arange(tokens, device="cuda"), *many_keys(draw, tokens))
    q, weights = draw.normal(batch, 1, 64, 128, dtype=torch.float8_e4m3fn), draw.normal(batch, 64)
    table = torch.stack([draw.permutation(tokens // 64).int()] * batch)
    lengths = draw.integers(1, tokens + 1, batch, 1)
    call = q, cache, weights, lengths, table, tokens
    chosen, peak = peak_of(lambda: dsa.index_select_paged(*call, 2048))
    assert peak <= 2 * GB, f"{peak / GB:.2f} GB"
    rows = slice(256, 512)
    few = dsa.indexer_logits_paged(q[rows], cache, weights[rows], lengths[rows], table[rows], tokens)
    assert torch.equal(chosen[rows, 0], dsa.select(few, lengths[rows].flatten(), 2048, page_table=table[rows]))
