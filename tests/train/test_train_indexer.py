"""The indexer's loss, as a model calls it: torch's own KL with autograd, both score forms, bf16 and FP8, windows and lists."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.problem.draw import Draw
from dsa_codegen.train.indexer import rounded_to_fp8

SCALE = 0.05


def leaves(dtype=torch.float32, device="cpu", queries=5, heads=3, tokens=11, index_heads=4):
    draw = Draw(3, device)
    q, kv = draw.normal(queries, heads, 576, dtype=dtype), draw.normal(tokens, 1, 576, dtype=dtype)
    shapes = (queries, index_heads, 32), (tokens, 32), (queries, index_heads)
    indexer = [draw.normal(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    ends = torch.arange(tokens - queries, tokens, dtype=torch.int32, device=device)
    lists = torch.stack([draw.permutation(tokens + 2)[:6] for _ in range(queries)])[:, None]
    return q, kv, indexer, {"starts": torch.ones_like(ends), "ends": ends}, {"indices": lists}


def plain(q, kv, indexer, columns, sink, score):
    """Row by row, by torch and its autograd; with lse of the tokens that count."""
    losses, lse = [], q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    for t in range(len(q)):
        if "indices" in columns:
            chosen = columns["indices"][t, 0]
            chosen = chosen[(chosen >= 0) & (chosen < len(kv))].long()
        else:
            chosen = torch.arange(int(columns["starts"][t]), int(columns["ends"][t]), device=q.device)
        s = (q[t].float() @ kv[chosen, 0].float().T) * SCALE
        lse[t] = s.logsumexp(-1)
        total = lse[t] if sink is None else torch.logaddexp(lse[t], sink)
        p = torch.exp(s - total[:, None]).sum(0)
        x, w = indexer[0][t].float() @ indexer[1][chosen].float().T, indexer[2][t].float()[:, None]
        scores = (x.relu() * w).sum(0) if score == "weighted_relu" else (x + w).relu().sum(0)
        losses.append(torch.nn.functional.kl_div(scores.log_softmax(0), p / p.sum(), reduction="sum"))
    return torch.stack(losses).mean(), lse


@pytest.mark.parametrize("score", ["weighted_relu", "relu_bias"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("with_sink", [False, True], ids=["plain", "sink"])
def test_is_torchs_kl_with_autograds_gradients(dense, score, with_sink):
    q, kv, indexer, windows, lists = leaves()
    columns, sink = windows if dense else lists, torch.tensor([0.5, -1.0, 2.0]) if with_sink else None
    wanted, lse = plain(q, kv, indexer, columns, sink, score)
    found = dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, **columns, sink=sink, score=score)
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(torch.autograd.grad(3 * found, indexer), torch.autograd.grad(3 * wanted, indexer), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_fp8_scores_are_those_of_serving_and_gradients_go_straight_through():
    q, kv, indexer, windows, _ = leaves(torch.bfloat16)
    lse = plain(q, kv, indexer, windows, None, "weighted_relu")[1]
    rounded = [rounded_to_fp8(indexer[0]), rounded_to_fp8(indexer[1]), indexer[2].detach()]
    assert not torch.equal(rounded[0], indexer[0])
    values, scales = dsa.quantize_index_k(indexer[1].detach())
    torch.testing.assert_close(rounded[1].float(), values.float() * scales[:, None], rtol=2**-8, atol=0)
    leaf = [each.requires_grad_() for each in rounded]
    straight = torch.autograd.grad(dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, **windows, scores="fp8"), indexer)
    other = torch.autograd.grad(dsa.train.indexer_loss(q, kv, lse, *leaf, SCALE, **windows), leaf)
    assert all(torch.equal(*pair) for pair in zip(straight, other, strict=True))


def test_lengths_cut_the_lists():
    q, kv, indexer, _, lists = leaves()
    lse = plain(q, kv, indexer, lists, None, "weighted_relu")[1]
    lengths = torch.tensor([6, 0, 3, 6, 1], dtype=torch.int32)
    cut = lists["indices"].clone()
    cut[torch.arange(6) >= lengths[:, None, None]] = -1
    found = dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, **lists, lengths=lengths)
    assert torch.equal(found, dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, indices=cut))


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_checkpointed_and_compiled_gradients_are_the_same(way):
    q, kv, indexer, _, lists = leaves()
    lse = plain(q, kv, indexer, lists, None, "weighted_relu")[1]

    def call(*indexer):
        return dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, indices=lists["indices"].int(), deterministic=True)

    torch._dynamo.reset()
    other = torch.compile(call, backend="aot_eager", fullgraph=True)
    if way == "checkpointed":
        other = lambda *x: checkpoint(call, *x, use_reentrant=False)  # noqa: E731
    for mine, wanted in zip(
        torch.autograd.grad(other(*indexer), indexer), torch.autograd.grad(call(*indexer), indexer), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_the_operator_keeps_its_promises_to_torch():
    q, kv, indexer, windows, _ = leaves()
    total = plain(q, kv, indexer, windows, None, "weighted_relu")[1]
    arguments = (q, kv, total, *indexer, SCALE, None, *windows.values(), "weighted_relu", False, False)
    torch.library.opcheck(torch.ops.dsa_codegen.indexer_loss_train.default, arguments)


@pytest.mark.parametrize(
    ("changes", "name"), [({"lengths": torch.zeros(5)}, "lengths"), ({"scores": "int4"}, "scores"), ({"ends": None}, "ends")]
)
def test_a_wrong_argument_is_named(changes, name):
    q, kv, indexer, windows, _ = leaves()
    with pytest.raises(InputError, match=f"^{name}"):
        dsa.train.indexer_loss(q, kv, torch.zeros(5, 3), *indexer, SCALE, **{**windows, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_a_gpu_agrees_with_torch(dense):
    q, kv, indexer, windows, lists = leaves(torch.bfloat16, "cuda", 64, 16, 600, 8)
    columns = windows if dense else lists
    wanted, lse = plain(q, kv, indexer, columns, None, "weighted_relu")
    found = dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, **columns)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    for mine, other in zip(torch.autograd.grad(found, indexer), torch.autograd.grad(wanted, indexer), strict=True):
        assert (mine.float() - other.float()).norm() < 1e-2 * other.float().norm()
