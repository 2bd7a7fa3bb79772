"""What the ranks' functions are made of: shards, merges of choices and of outputs, rows dealt out by keys."""

from __future__ import annotations

import itertools

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import choice, distributed
from dsa_codegen.distributed import Shard
from dsa_codegen.distributed import candidates as candidates_module
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.problem.compare import ATTENTION, LSE, close
from dsa_codegen.problem.draw import Draw

import exact_inputs

TOPK = 64
SHARDS = {
    "one": [Shard.interleaved(0, 1)],
    "tokens": [Shard.interleaved(rank, 3) for rank in range(3)],
    "blocks": [Shard.interleaved(rank, 4, 16) for rank in range(4)],
    "stretches": [Shard.stretch(0, 70), Shard.stretch(70, 0), Shard.stretch(70, 1), Shard.stretch(71, 500)],
    "gaps": [Shard(2, stride=5, block=3), Shard(0, stride=5, block=2)],
}


@pytest.mark.parametrize("name", SHARDS)
def test_every_token_is_of_one_rank_and_found_again(name):
    tokens = torch.arange(200, dtype=torch.int32)
    local = torch.stack([shard.to_local(tokens) for shard in SHARDS[name]])
    assert ((local >= 0).sum(0) == 1).all()
    for shard, own in zip(SHARDS[name], local, strict=True):
        held = own >= 0
        assert torch.equal(own[held], torch.arange(int(held.sum()), dtype=torch.int32))
        assert torch.equal(shard.to_global(own), tokens.masked_fill(~held, -1))
        counts = torch.stack([held[:length].sum() for length in range(201)])
        assert torch.equal(shard.count(torch.arange(201)), counts.int())
        assert [shard.number(length) for length in range(201)] == counts.tolist()
    assert shard.to_local(torch.tensor([-1])).item() == shard.to_global(torch.tensor([-1])).item() == -1
    assert shard.count(torch.tensor([-5])).item() == 0


@pytest.mark.parametrize("name", SHARDS)
def test_lengths_are_looked_up_alike(name, monkeypatch):
    monkeypatch.setattr("dsa_codegen.distributed.shard._HELD", {})  # this many shards are no engine's
    lengths = torch.cat([torch.arange(-3, 260, dtype=torch.int32), torch.tensor([2**31 - 1], dtype=torch.int32)])
    for shard in SHARDS[name]:
        for most in (0, 37, 600):
            assert torch.equal(shard.counted(lengths, most), shard.count(lengths).clamp(max=most))


@pytest.mark.parametrize("make", [lambda: Shard(-1), lambda: Shard(0, 2, 3), lambda: Shard.interleaved(2, 2)])
def test_impossible_shards_are_refused(make):
    with pytest.raises(SpecError):
        make()


@pytest.mark.parametrize("shard", [None, 3])
def test_what_is_no_shard_is_named(shard):
    with pytest.raises(InputError, match=r"^shard: .*Shard\.interleaved"):
        distributed.localise(torch.zeros(2, 4, dtype=torch.int32), shard)


def test_localise_puts_the_own_in_front():
    chosen = torch.tensor([[1, 2, 4, -1, 7], [0, 2, 4, 6, 8], [-1, -1, -1, -1, -1]], dtype=torch.int32)
    local, counts = distributed.localise(chosen, Shard.interleaved(1, 2))
    assert local.tolist() == [[0, 3, -1, -1, -1], [-1] * 5, [-1] * 5]
    assert counts.tolist() == [2, 0, 0] and counts.dtype == local.dtype == torch.int32


def candidates(scores, ends, starts, shards):
    """(scores, tokens) of what each shard chooses by itself."""
    parts = []
    for shard in shards:
        own = shard.to_global(torch.arange(int(shard.count(torch.tensor(scores.shape[1]))), dtype=torch.int32))
        local = scores[:, own.long()].contiguous()
        chosen = dsa.select(local, shard.count(ends), TOPK, starts=shard.count(starts))
        found = chosen.clamp(min=0).long()
        best = local.gather(1, found) if local.shape[1] else torch.zeros(chosen.shape)
        parts.append((best.float().masked_fill(chosen < 0, -torch.inf), shard.to_global(chosen)))
    return [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]


def special(scores, draw):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    return torch.where(draw.uniform(*scores.shape) < 0.7, values[draw.integers(0, 5, *scores.shape)], scores)


KINDS = {
    "normal": lambda scores, draw: scores,
    "few": lambda scores, draw: scores.round(),
    "equal": lambda scores, draw: torch.zeros_like(scores),
    "special": special,
    "nan": lambda scores, draw: scores.masked_fill(draw.uniform(*scores.shape) < 0.95, torch.nan),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARDS)
def test_lists_that_ascend_are_merged_alike(name, kind):
    for seed in range(3):
        draw = Draw(seed)
        scores = KINDS[kind](draw.normal(12, 300), draw)
        starts = draw.integers(-3, 200, 12)
        ends = (starts + draw.integers(-5, 300, 12)).clamp(max=300).int()
        parts = [each.unflatten(1, (-1, TOPK)).transpose(0, 1) for each in candidates(scores, ends, starts, SHARDS[name])]
        ranked, tokens = parts[0], parts[1].masked_fill(parts[1] < 0, candidates_module.NO_TOKEN)
        merged = candidates_module.merge_ascending(torch.stack([tokens, ranked.view(torch.int32)], 2), TOPK)
        assert torch.equal(merged, dsa.select(scores, ends, TOPK, starts=starts))


@pytest.mark.parametrize("keep", [{}, {"keep_first": 5, "keep_recent": 20}, {"keep_recent": 64}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARDS)
def test_a_merge_is_the_choice_from_all_scores(name, kind, keep):
    for seed in range(5):
        draw = Draw(seed)
        scores = KINDS[kind](draw.normal(12, 300), draw)
        starts = draw.integers(-3, 200, 12)
        ends = (starts + draw.integers(-5, 300, 12)).clamp(max=300).int()
        found = candidates(scores, ends, starts, SHARDS[name])
        order = torch.randperm(found[0].shape[1], generator=torch.Generator().manual_seed(seed))
        mixed = [each[:, order].contiguous() for each in found]
        merged = distributed.merge_choices(*mixed, TOPK, starts=starts, ends=ends, **keep)
        assert torch.equal(merged, dsa.select(scores, ends, TOPK, starts=starts, **keep))


@pytest.mark.parametrize("shard", [Shard.interleaved(1, 2, 16), Shard.stretch(40, 300)], ids=["pages", "stretch"])
def test_candidates_in_chunks_are_those_of_one_call(shard):
    """Also where the budget holds the logits of four sequences only; tokens are those that the part alone would choose."""
    inputs = exact_inputs.paged(6, 2, 300, 16)
    held = shard.offset, shard.stride, shard.block
    whole = choice.candidates_paged(**inputs, topk=TOPK, held=held)
    assert torch.equal(choice.candidates_paged(**inputs, topk=TOPK, held=held, max_bytes=1), whole)
    scores = torch.empty(6, 2, TOPK)
    tokens = dsa.index_select_paged(**inputs, topk=TOPK, slots=False, chosen_scores=scores).flatten(0, 1)
    assert torch.equal(whole[:, 0], shard.to_global(tokens, candidates_module.NO_TOKEN))
    assert torch.equal(whole[:, 1].view(torch.float32), scores.flatten(0, 1))


def test_zeros_of_both_signs_are_one_number():
    """Also for a sort that compares bits, as GPUs may: the numbers that are sorted have one zero."""
    assert not candidates_module._rank(torch.tensor([-0.0, 0.0])).signbit().any()


def test_a_merge_of_fewer_than_topk_is_padded():
    tokens = torch.tensor([[9, -1, 2]], dtype=torch.int32)
    merged = distributed.merge_choices(torch.zeros(1, 3), tokens, TOPK)
    assert merged.tolist() == [[2, 9] + [-1] * 62]
    assert distributed.merge_choices(torch.zeros(0, 3), tokens[:0], TOPK).shape == (0, TOPK)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"tokens": torch.zeros(2, 3)}, "tokens"), ({"scores": torch.zeros(2, 4)}, "scores"), ({"keep_first": 3}, "ends")],
    ids=["dtype", "shape", "ends"],
)
def test_mistakes_of_a_merge_are_named(change, named):
    call = {"scores": torch.zeros(2, 3), "tokens": torch.zeros(2, 3, dtype=torch.int32), "topk": TOPK, **change}
    with pytest.raises(InputError, match=f"^{named}:"):
        distributed.merge_choices(**call)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_outputs_of_parts_are_the_whole(parts, sinks):
    draw = Draw(8)
    q = draw.normal(7, 16, 576, dtype=torch.bfloat16, scale=10.0)
    kv = draw.normal(200, 1, 576, dtype=torch.bfloat16, scale=0.1)
    indices = torch.stack([draw.permutation(200)[:TOPK] for _ in range(7)])[:, None].int()
    indices[3] = -1
    indices[4] -= indices[4] % parts  # all in one part: the others' share of this row is nothing
    sink = draw.normal(16) if sinks else None
    whole = dsa.sparse_attention(q, kv, indices, 576**-0.5, sink=sink)
    split = [dsa.sparse_attention(q, kv, indices.masked_fill(indices % parts != part, -1), 576**-0.5) for part in range(parts)]
    out, lse = (torch.stack(each) for each in zip(*split, strict=True))
    out[lse.isneginf()] = torch.nan  # nothing is read there
    merged = distributed.merge_attention(out, lse, sink)
    for name, value, one, limit in zip(("out", "lse"), merged, whole, (ATTENTION, LSE), strict=True):
        result = close(name, value, one, limit)
        assert result.passed, result.detail
    assert not merged[0][3].any() and merged[1][3].isneginf().all()


def test_a_sink_of_nothing_leaves_an_empty_row_empty():
    out, total = distributed.merge_attention(
        torch.zeros(2, 1, 4, 8), torch.full((2, 1, 4), -torch.inf), torch.full((4,), -torch.inf)
    )
    assert not out.any() and total.isneginf().all()


def test_nan_stays_in_its_row_and_head():
    out, lse = torch.ones(2, 3, 16, 512), torch.zeros(2, 3, 16)
    out[1, 2, 5], lse[1, 2, 5] = torch.nan, torch.nan
    merged, total = distributed.merge_attention(out, lse)
    bad = torch.zeros(3, 16, dtype=torch.bool)
    bad[2, 5] = True
    assert torch.equal(merged.isnan().any(-1), bad) and torch.equal(total.isnan(), bad)
    assert torch.equal(merged[~bad], torch.ones(47, 512))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("keys", [list(range(1000, 1100)), [5] * 3, [], [0] * 40, [1, 1, 1, 10**6, 1, 1], [7] * 64], ids=len)
def test_rows_are_balanced_by_keys(keys, world):
    bounds = distributed.balanced_bounds(keys, world)
    assert len(bounds) == world + 1 and (bounds[0], bounds[-1]) == (0, len(keys)) and bounds == sorted(bounds)
    costs = [seen + 1 for seen in keys]
    most = max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
    assert most <= sum(costs) / world + max(costs, default=0)


def test_causal_rows_are_not_dealt_out_by_number():
    """Of 100 rows that see 1 to 100 keys, half of the work lies in the last 30."""
    ends = torch.arange(1, 101, dtype=torch.int32)
    keys = distributed.keys_seen(torch.full_like(ends, -3), ends, 90)
    assert keys == [min(end, 90) for end in range(1, 101)]
    assert 66 <= distributed.balanced_bounds(keys, 2)[1] <= 72


def test_no_rank_is_refused():
    with pytest.raises(SpecError, match="world"):
        distributed.balanced_bounds([1], 0)
