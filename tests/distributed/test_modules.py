"""A module whose work ranks share: the choices of one rank, its outputs within limits, its bits where the model asks."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import nn, train
from dsa_codegen.distributed import ContextParallel, DataParallel, Deal, Shard, TensorParallel
from dsa_codegen.errors import InputError

import deepseek_layer
import rank_inputs

WORLDS = pytest.mark.parametrize("world", rank_inputs.worlds(4))
PREFILLED = [number for number, (counts, _) in enumerate(deepseek_layer.SHARED_STEPS) if counts]


def assert_alike(found, expected):
    """Step by step: the same tokens, outputs as products of other shapes give them, rounded to BF16 before attention."""
    assert len(found) == len(expected)
    for (out, chosen), (wanted, tokens) in zip(found, expected, strict=True):
        assert torch.equal(chosen, tokens)
        torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2e-3)


@WORLDS
@pytest.mark.parametrize("way", ["pages", "own heads", "tensor"])
def test_every_way_serves_what_one_rank_does(results, world, way):
    expected = results[1][0]["modules", False]
    for rank in results[world]:
        if way in rank["modules"]:
            assert_alike(rank["modules"][way], expected)
        else:
            assert deepseek_layer.HEADS % world
            assert f"{world} ranks; expected a divisor of 4 heads" in rank["modules"][f"{way} refused"]


@WORLDS
@pytest.mark.parametrize("way", ["blocks", "data"])
def test_batch_invariant_steps_have_the_bits_of_one_rank(results, world, way):
    """But for decode over caches that are sharded, whose sums are taken rank by rank."""
    expected = results[1][0]["modules", True]
    for rank in results[world]:
        assert_alike(rank["modules"][way], expected)
        for number in PREFILLED if way == "blocks" else range(len(expected)):
            assert torch.equal(rank["modules"][way][number][0], expected[number][0]), number


@WORLDS
def test_ranks_without_a_sequence_take_part(results, world):
    layer = deepseek_layer.made(rank_inputs.nn_model(), None)
    caches = nn.PagedCache(layer.model, nn.rotary_table(256, 64), layers=1, blocks=1, batch=1)
    expected = layer(deepseek_layer.hidden()[:9], caches.layers[0], caches.prefill([9]))
    for rank in results[world]:
        torch.testing.assert_close(rank["modules"]["everyone's"], expected)


def test_the_steps_have_rows_that_score_and_ranks_that_have_none(results):
    expected = results[1][0]["modules", False]
    assert (expected[0][1] >= 0).sum(1).max() == deepseek_layer.TOPK < 70
    assert all(out.isfinite().all() for out, _ in expected)


@pytest.fixture
def alone():
    """A group of one, in this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


TINY, SHAPE, TABLE = dsa.preset("tiny"), nn.Shape(32, 16, 16, 16), nn.rotary_table(256, 64)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("parallel.deal", lambda: nn.SparseAttention(TINY, SHAPE, parallel=ContextParallel())),
        ("parallel.deal", lambda: nn.SparseAttention(TINY, SHAPE, parallel=ContextParallel(Deal.zigzag(4, 1)))),
        ("parallel.shard", lambda: cached(ContextParallel("interleaved", shard=Shard.stretch(0, 9)))),
        ("parallel", lambda: nn.SparseAttention(TINY, SHAPE, parallel="tensor")),
        ("parallel", lambda: cached("tensor")),
        ("group", lambda: nn.SparseAttention(TINY, SHAPE, parallel=DataParallel(), group=torch.distributed.group.WORLD)),
        ("plain", lambda: cached(ContextParallel("interleaved"), plain=torch.bfloat16)),
        ("scores", lambda: cached(ContextParallel("interleaved"), scores="bf16")),
        ("step", lambda: run(nn.SparseAttention(TINY, SHAPE), cached(ContextParallel("interleaved")))),
        ("step", lambda: run(nn.SparseAttention(TINY, SHAPE, parallel=ContextParallel("interleaved")), cached(None))),
    ],
)
def test_what_a_module_cannot_share_is_named(named, make):
    with pytest.raises(InputError, match=f"^{named}:"):
        make()


def cached(parallel, **options):
    return nn.PagedCache(TINY, TABLE, layers=1, blocks=4, batch=1, parallel=parallel, **options)


def run(layer, caches, **step):
    return layer(torch.zeros(3, 32).bfloat16(), caches.layers[0], caches.prefill((3,), **step))


def test_gradients_are_not_lost_without_a_word():
    layer = nn.SparseAttention(TINY, SHAPE)
    caches = cached(None)
    with pytest.raises(InputError, match=r"^hidden: got a tensor that requires a gradient.*run_layer"):
        layer(torch.zeros(3, 32).bfloat16().requires_grad_(), caches.layers[0], caches.prefill((3,)))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("parallel", [ContextParallel("interleaved"), TensorParallel()], ids=lambda each: type(each).__name__)
def test_no_such_layer_is_trained(parallel):
    layer = nn.SparseAttention(TINY, SHAPE, parallel=parallel)
    place = torch.arange(3)
    windows = train.Windows(TABLE, place, torch.zeros(3, dtype=torch.int32), (place + 1).int())
    with pytest.raises(InputError, match=rf"^layer: got one under {type(parallel).__name__}"):
        train.run_layer(layer, torch.zeros(3, 32).bfloat16(), windows)
    alone = nn.SparseAttention(TINY, SHAPE, parallel=DataParallel())
    alone.load_state_dict(layer.state_dict())
    assert train.run_layer(alone, torch.ones(3, 32).bfloat16(), windows).out.shape == (3, 32)


@pytest.mark.usefixtures("alone")
def test_a_rank_that_is_full_says_so_before_any_takes_a_page():
    caches = cached(ContextParallel("interleaved"))
    with pytest.raises(InputError, match=r"^counts: .*4 pages that are free"):
        caches.prefill((257,))
    assert caches.held == [0] and len(caches.prefill((200,)).positions) == 200


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "parallel", [ContextParallel("interleaved"), TensorParallel(), DataParallel()], ids=lambda each: type(each).__name__
)
def test_a_modules_warmup_covers_what_its_ranks_call(parallel, covers):
    layer, caches = nn.SparseAttention(TINY, SHAPE, parallel=parallel), cached(parallel)

    def steps():
        layer(torch.zeros(100, 32).bfloat16(), caches.layers[0], caches.prefill((100,)))
        layer(torch.zeros(1, 32).bfloat16(), caches.layers[0], caches.decode())

    covers(lambda: layer.warmup(max_queries=128, max_batch=1, max_context=256, next_n=(1,)), steps)
