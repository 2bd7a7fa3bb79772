"""A choice against what is at hand: bit for bit against the reference, what it refuses, and attention over a hot buffer."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.distributed import Shard, localise, merge_attention
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.resolve import OP, ResolveSizes, ResolveSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.caches import KvV32Layout
from dsa_codegen.problem.compare import ATTENTION, LSE, close
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.runtime import dispatch

from support import H200, assert_compiles, assert_matches_reference

SPECS = list(dict.fromkeys(option for spec in OP.specs(presets.preset("tiny")) for option in OP.options(spec)))
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
SMALL = Config.of("triton", num_warps=4)


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("topk", [64, 2048, 8192])
def test_compiles_for_hopper(topk):
    spec = ResolveSpec(topk)
    assert_compiles(OP, spec, OP.default_config(spec, ResolveSizes(64, 65536), H200))


@pytest.mark.parametrize("misses", [True, False])
def test_every_entry_is_here_or_missing_or_none(misses):
    spec = ResolveSpec(64, 3, misses)
    inputs = OP.inputs(spec, Case(ResolveSizes(8, 50)), Draw(3))
    found = OP.reference(spec, inputs)
    for row, chosen in enumerate(inputs["chosen"].tolist()):
        blocks = inputs["page_table"][row // 2].tolist()
        block = [blocks[token // 3] if 0 <= token < 150 else -1 for token in chosen]
        here = [number * 3 + token % 3 for number, token in zip(block, chosen, strict=True) if number >= 0]
        assert found["slots"][row].tolist() == here + [-1] * (64 - len(here)) and found["counts"][row] == len(here)
        if misses:
            away = [token for number, token in zip(block, chosen, strict=True) if number < 0 <= token]
            assert found["misses"][row].tolist() == away + [-1] * (64 - len(away)) and found["missed"][row] == len(away)


@pytest.mark.parametrize("shard", [Shard.interleaved(1, 3, 4), Shard.interleaved(0, 2), Shard.stretch(20, 33)], ids=str)
def test_a_shard_is_localised_alike(shard):
    """What the ranks' functions do in three steps: the rank's own of a choice, their slots, how many."""
    draw = Draw(5)
    chosen = draw.integers(-20, 200, 6, 64).clamp(min=-1)
    table = draw.permutation(90).view(3, 30).int()
    local, counts = localise(chosen, shard)
    arguments = (chosen, table, 8, False, shard.offset, shard.stride, shard.block, shard.tokens)
    found = dispatch.call(OP, arguments)
    assert torch.equal(found["counts"], counts)
    assert torch.equal(found["slots"], dsa.choice.slots_of(local, table, 8))


CHOSEN, TABLE = torch.zeros(4, 64, dtype=torch.int32), torch.zeros(2, 9, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("chosen", (CHOSEN.long(), TABLE)),
        ("chosen", (CHOSEN[0], TABLE)),
        ("page_table", (CHOSEN, TABLE.float())),
        ("page_table", (CHOSEN[:3], TABLE)),
        ("page_table", (CHOSEN, TABLE[:0])),
    ],
)
def test_call_refuses(argument, arguments):
    with pytest.raises(InputError, match=f"^{argument}"):
        dsa.resolve(*arguments)


@pytest.mark.parametrize(("name", "change"), [("stride", {5: 2, 6: 3}), ("tokens", {7: -1}), ("offset", {4: -1})])
def test_an_impossible_shard_is_refused(name, change):
    arguments = [CHOSEN, TABLE, 1, True, 0, 1, 1, 9]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(InputError, match=f"^{name}"):
        dispatch.call(OP, arguments)


@pytest.mark.parametrize("fields", [{"topk": 0}, {"topk": 9000}, {"page": 0}, {"page": 2048}], ids=str)
def test_spec_refuses(fields):
    with pytest.raises(SpecError):
        ResolveSpec(**{"topk": 64, **fields})


@pytest.fixture
def offloaded():
    """A sequence's latents in the host's memory, and what whole attention gives of a choice."""
    draw, layout = Draw(7), KvV32Layout(1)
    host = layout.empty(400)  # a row for each token
    nope, rope = (draw.normal(400, width, dtype=torch.bfloat16, scale=0.1) for width in (512, 64))
    dsa.store_kv(nope, rope, torch.arange(400, dtype=torch.int32), host)
    q = draw.normal(2, 2, 16, 576, dtype=torch.bfloat16, scale=10.0)
    chosen = torch.stack([draw.permutation(400)[:64].sort().values for _ in range(4)]).int()
    chosen[1, 50:], chosen[3] = -1, -1
    whole = dsa.sparse_attention_paged(q, host, chosen.view(2, 2, 64), 576**-0.5)
    return host, q, chosen, whole


def assert_alike(found, whole):
    for name, value, one, limit in (("out", found[0], whole[0], ATTENTION), ("lse", found[1], whole[1], LSE)):
        result = close(name, value, one, limit)
        assert result.passed, result.detail


def test_attention_takes_rows_of_a_hot_buffer(offloaded):
    """Flat row numbers, in any order, -1 anywhere, and counts per row: the buffer's pages are one row each."""
    host, q, chosen, whole = offloaded
    place = Draw(8).permutation(500).int()  # token -> row of a buffer that is larger than the sequence
    hot = host.new_zeros(500, *host.shape[1:])
    hot[place[:400].long()] = host
    rows = place[chosen.clamp(min=0).long()].masked_fill(chosen < 0, -1)
    assert_alike(dsa.sparse_attention_paged(q, hot, rows.view(2, 2, 64), 576**-0.5), whole)
    order = Draw(9).permutation(64)
    assert_alike(dsa.sparse_attention_paged(q, hot, rows[:, order].view(2, 2, 64).contiguous(), 576**-0.5), whole)
    counts = (chosen >= 0).sum(1, dtype=torch.int32)
    behind = rows.clone()
    behind[torch.arange(64) >= counts[:, None]] = 7  # whatever lies there is not looked at
    found = dsa.sparse_attention_paged(q, hot, behind.view(2, 2, 64), 576**-0.5, lengths=counts.view(2, 2))
    assert_alike(found, whole)


def test_misses_are_fetched_while_the_resident_are_attended_to(offloaded):
    """A whole step: two sequences share a buffer, a part of the choice is resident, the rest comes and is merged by lse."""
    host, q, chosen, whole = offloaded
    table = torch.full((2, 400), -1, dtype=torch.int32)
    hot, free = host.new_zeros(300, *host.shape[1:]), 0
    for request in range(2):
        held = torch.arange(request, 400, 7)
        table[request, held] = torch.arange(free, free + len(held), dtype=torch.int32)
        hot[free : free + len(held)] = host[held]
        free += len(held)
    slots, counts, misses, missed = dsa.resolve(chosen, table)
    assert counts[0] and missed[0] and (counts + missed == (chosen >= 0).sum(1)).all()
    now = dsa.sparse_attention_paged(q, hot, slots.view(2, 2, 64), 576**-0.5, lengths=counts.view(2, 2))
    for request in range(2):
        wanted = misses[2 * request : 2 * request + 2].flatten().unique()
        wanted = wanted[wanted >= 0].long()
        table[request, wanted] = torch.arange(free, free + len(wanted), dtype=torch.int32)
        hot[free : free + len(wanted)] = host[wanted]  # the loader's copy
        free += len(wanted)
    late, late_counts, *nothing = dsa.resolve(misses, table)
    assert torch.equal(late_counts, missed) and not nothing[1].any()
    then = dsa.sparse_attention_paged(q, hot, late.view(2, 2, 64), 576**-0.5, lengths=late_counts.view(2, 2))
    out, lse = (torch.stack(each) for each in zip(now, then, strict=True))
    assert_alike(merge_attention(out, lse), whole)
