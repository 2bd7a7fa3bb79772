"""A layer in training: the same outputs as when it serves, and each part learns from its own loss alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dsa_codegen as dsa
from dsa_codegen import nn
from dsa_codegen.errors import InputError
from dsa_codegen.problem.compare import similarity_gap
from dsa_codegen.problem.presets import Model

TINY = Model("small", 2, 512, 64, 8, 64, 64)
SHAPE = nn.Shape(hidden=96, q_rank=48, d_head=32, d_v=24)
TABLE = nn.rotary_table(512, 64)
LENGTHS = (90, 70)


@pytest.fixture
def layer():
    torch.manual_seed(3)
    return nn.SparseAttention(TINY, SHAPE)


@pytest.fixture
def hidden():
    return torch.randn(sum(LENGTHS), SHAPE.hidden, generator=torch.Generator().manual_seed(5)).bfloat16()


def windows():
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    starts = torch.cat([torch.full((length,), start) for length, start in zip(LENGTHS, (0, LENGTHS[0]), strict=True)])
    return dsa.train.Windows(TABLE, positions, starts.int(), (starts + positions + 1).int())


@pytest.mark.parametrize("scores", ["bf16", "fp8"])
def test_sparse_training_computes_what_serving_does(layer, hidden, scores):
    keys = {"scores": "bf16"} if scores == "bf16" else {}
    caches = nn.PagedCache(TINY, TABLE, layers=1, blocks=8, batch=2, max_context=256, plain=torch.bfloat16, **keys)
    served = layer(hidden, caches.layers[0], caches.prefill(LENGTHS))
    trained = dsa.train.run_layer(layer, hidden, windows(), scores=scores)
    # With FP8 serving rounds queries and keys once less: of scores at the threshold another may be chosen.
    assert similarity_gap(trained.out, served) < (1e-6 if scores == "bf16" else 1e-3)
    assert (trained.chosen >= 0).sum(1).tolist() == [min(i + 1, 64) for length in LENGTHS for i in range(length)]


def test_where_all_is_chosen_dense_and_sparse_are_one(layer, hidden):
    short = windows()._replace(ends=windows().starts + windows().positions.int().clamp(max=63) + 1)
    dense, sparse = (dsa.train.run_layer(layer, hidden, short, stage=stage) for stage in ("warm-up", "sparse"))
    torch.testing.assert_close(dense.out, sparse.out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dense.indexer_loss, sparse.indexer_loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["dense", "warm-up", "sparse"])
def test_each_part_learns_from_its_own_loss_alone(layer, hidden, stage):
    out, loss, _ = dsa.train.run_layer(layer, hidden, windows(), stage=stage)
    indexer = {f"indexer.{name}" for name, _ in layer.indexer.named_parameters()}
    every = dict(layer.named_parameters())
    taught = torch.autograd.grad(out.float().square().sum(), list(every.values()), allow_unused=True, retain_graph=True)
    assert {name for name, grad in zip(every, taught, strict=True) if grad is not None} == every.keys() - indexer
    if stage == "dense":
        assert loss is None
        return
    taught = torch.autograd.grad(loss, list(every.values()), allow_unused=True)
    assert {name for name, grad in zip(every, taught, strict=True) if grad is not None and grad.abs().sum() > 0} == indexer


@pytest.mark.parametrize(
    ("stage", "way"),
    [
        ("sparse", "checkpointed"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("warm-up", "checkpointed"), ("warm-up", "compiled"))),
        pytest.param("sparse", "compiled", marks=pytest.mark.slow),
    ],
)
def test_checkpointed_and_compiled_gradients_are_the_same(layer, hidden, stage, way):
    learned = [*layer.parameters()]

    def call(hidden):
        out, loss, _ = dsa.train.run_layer(layer, hidden, windows(), stage=stage, deterministic=True)
        return out.float().square().mean() + loss

    torch._dynamo.reset()
    other = torch.compile(call, backend="aot_eager", fullgraph=True)
    if way == "checkpointed":
        other = lambda x: checkpoint(call, x, use_reentrant=False)  # noqa: E731
    found, wanted = (torch.autograd.grad(each(hidden), learned) for each in (other, call))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_stage_that_does_not_exist_is_named(layer, hidden):
    with pytest.raises(InputError, match=r"^stage"):
        dsa.train.run_layer(layer, hidden, windows(), stage="frozen")
