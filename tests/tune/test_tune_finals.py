"""The choice of a winner: noise does not decide, the default is kept where it is as good, ties are broken for good."""

from __future__ import annotations

import itertools

import pytest

from dsa_codegen.proof.timing import Timing
from dsa_codegen.tune.finals import Finalist, choose, tied

from tune_support import DEFAULT, config


def finalist(choice, median, smem=1000, mad=0.0, default=False, n=10):
    half = mad / 0.4 / 2
    return Finalist(choice, Timing(median, median - half, median + half, n), smem, default)


def test_the_fastest_wins_beyond_the_tie():
    fast, slow = finalist(config(splits=1), 98.0, smem=9000), finalist(config(splits=2), 100.0, smem=10)
    assert choose([slow, fast]) is fast


def test_within_one_per_cent_the_least_shared_memory_wins():
    fast, small = finalist(config(splits=1), 100.0, smem=9000), finalist(config(splits=2), 100.9, smem=10)
    assert choose([fast, small]) is small


def test_noise_widens_the_tie():
    noisy = finalist(config(splits=1), 100.0, smem=9000, mad=2.0)
    near, far = finalist(config(splits=2), 103.9, smem=10), finalist(config(splits=4), 104.1, smem=1)
    assert tied([noisy, near, far]) == [noisy, near]
    assert choose([noisy, near, far]) is near


def test_then_fewer_stages_then_the_alphabet():
    deep, flat = finalist(config(num_stages=4), 100.0), finalist(config(num_stages=2), 100.5)
    assert choose([deep, flat]) is flat
    one, two = finalist(config(splits=1), 100.5), finalist(config(splits=2), 100.0)
    assert choose([two, one]) is one


def test_the_order_of_finalists_does_not_matter():
    field = [finalist(config(splits=splits), 100 + splits / 10, smem=1000 - splits) for splits in (1, 2, 4, 8)]
    assert len({choose(order).config for order in itertools.permutations(field)}) == 1


@pytest.mark.parametrize(("median", "kept"), [(100.9, True), (101.1, False), (99.0, True)])
def test_the_default_is_kept_only_where_it_ties(median, kept):
    best, default = finalist(config(splits=2), 100.0, smem=1), finalist(DEFAULT, median, smem=9000, default=True)
    assert (choose([best, default]) is default) is kept


@pytest.mark.parametrize(("median", "kept"), [(120.0, True), (130.0, False)])
def test_a_model_must_promise_more_to_displace_the_default(median, kept):
    best, default = finalist(config(splits=2), 100.0, n=0), finalist(DEFAULT, median, default=True, n=0)
    assert (choose([best, default]) is default) is kept


def test_of_modelled_times_the_fastest_is_taken_where_no_default_is_near():
    fast, small = finalist(config(splits=2), 100.0, smem=9000, n=0), finalist(config(splits=1), 101.0, smem=1, n=0)
    assert choose([small, fast]) is fast
