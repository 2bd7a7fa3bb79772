"""Deals: every row of one rank, all ranks with about as many keys, and rows that come back in the sequence's order."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.distributed import Deal
from dsa_codegen.distributed.gather import Gathering
from dsa_codegen.errors import InputError, SpecError

WORLDS = range(1, 9)
CAUSAL = [row + 1 for row in range(1000)]
TWO = [row % 700 + 1 for row in range(1000)]
SLIDING = [min(row + 1, 128) for row in range(1000)]


def dealt(kind: str, keys: list[int], world: int) -> Deal:
    if kind == "by_keys":
        return Deal.by_keys(keys, world, 8)
    return Deal.zigzag(len(keys), world) if kind == "zigzag" else Deal.interleaved(len(keys), world)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 100])
@pytest.mark.parametrize("kind", ["zigzag", "interleaved", "by_keys"])
def test_every_row_is_of_one_rank(kind, rows, world):
    deal = dealt(kind, CAUSAL[:rows], world)
    assert (deal.world, deal.tokens, deal.most) == (world, rows, max(deal.counts))
    assert torch.cat([deal.rows(rank) for rank in range(world)]).sort().values.tolist() == list(range(rows))
    for rank in range(world):
        own = deal.rows(rank)
        assert own.tolist() == sorted(own.tolist()) and len(own) == deal.counts[rank]
        assert torch.equal(deal.own(torch.arange(rows), rank), own)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("kind", "keys"),
    [("zigzag", CAUSAL), ("interleaved", CAUSAL), ("by_keys", CAUSAL), ("by_keys", TWO), ("by_keys", SLIDING)],
)
def test_ranks_see_about_as_many_keys(kind, keys, world):
    deal = dealt(kind, keys, world)
    seen = [sum(keys[row] for row in deal.rows(rank).tolist()) for rank in range(world)]
    assert max(seen) <= 1.02 * sum(keys) / world
    if world == 4 and keys is CAUSAL:  # which stretches one behind the other are not
        assert sum(keys[750:]) > 1.7 * max(seen)


def test_two_sequences_are_no_triangle():
    """What ``by_keys`` is for: zigzag leaves one rank a third more keys than another."""
    seen = [sum(TWO[row] for row in Deal.zigzag(1000, 4).rows(rank).tolist()) for rank in range(4)]
    assert max(seen) > 1.25 * min(seen)


@pytest.mark.parametrize("kind", ["zigzag", "interleaved", "by_keys"])
@pytest.mark.parametrize("rows", [1, 5, 64, 101])
def test_parts_come_back_in_order(kind, rows, monkeypatch):
    """What every rank sends, without a transport: rows of any dtype and width, several tensors in one message."""
    deal, draw = dealt(kind, CAUSAL[:rows], 3), torch.Generator().manual_seed(1)
    bits = torch.randint(0, 256, (rows, 132), generator=draw).byte()
    whole = [bits.view(torch.int32).view(rows, 33)[:, :2].bfloat16(), bits[:, :7].contiguous(), bits[:, 0].float()]
    sent = []
    for arrive in (False, True):
        for rank in range(3):

            def exchange(message, group, wait, arrive=arrive):
                if not arrive:
                    sent.append(message)
                return (torch.stack(sent) if arrive else message.new_empty(3, len(message))), None

            monkeypatch.setattr("dsa_codegen.distributed.gather._start", exchange)
            gathering = Gathering([deal.own(each, rank) for each in whole], deal, None)
            if arrive:
                assert all(torch.equal(a, b) for a, b in zip(gathering.wait(), whole, strict=True))


@pytest.mark.parametrize("make", [lambda: Deal.zigzag(-1, 2), lambda: Deal.zigzag(4, 0), lambda: Deal.interleaved(4, 2, 0)])
def test_impossible_deals_are_refused(make):
    with pytest.raises(SpecError):
        make()


def test_another_number_of_rows_is_refused():
    with pytest.raises(InputError, match=r"^whole: got 5 rows"):
        Deal.zigzag(6, 2).own(torch.zeros(5), 0)
