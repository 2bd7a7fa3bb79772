"""Dense attention with gradients: the same as sparse attention over lists of every token."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.ops.attention_dense import formulas
from dsa_codegen.problem.draw import Draw

SCALE = 0.05


def leaves(dtype=torch.float32, device="cpu", queries=6, heads=3, tokens=9):
    draw = Draw(3, device)
    q = draw.normal(queries, heads, 576, dtype=dtype).requires_grad_()
    kv = draw.normal(tokens, 1, 576, dtype=dtype).requires_grad_()
    starts = torch.tensor([0, 0, 0, -2, 3, 5], dtype=torch.int32, device=device)
    ends = torch.tensor([1, 2, 9, 4, 7, 5], dtype=torch.int32, device=device)
    return q, kv, starts, ends, draw.normal(heads).requires_grad_()


def as_lists(starts, ends, tokens):
    token = torch.arange(tokens, dtype=torch.int32, device=ends.device).expand(len(ends), -1)
    return torch.where((token >= starts[:, None]) & (token < ends[:, None]), token, -1)[:, None].contiguous()


def gradients_of(out, lse, leaves):
    seen = torch.where(lse.isfinite(), lse, 0.0)
    return torch.autograd.grad((out.float() ** 2).sum() + seen.square().sum(), leaves)


@pytest.mark.parametrize("step", [1, 100], ids=["query by query", "at once"])
@pytest.mark.parametrize("with_sink", [False, True], ids=["plain", "sink"])
def test_is_sparse_attention_over_lists_of_every_token(monkeypatch, step, with_sink):
    monkeypatch.setattr(formulas, "BYTES", step * 4 * 3 * 9)
    q, kv, starts, ends, sink = leaves()
    sink = sink if with_sink else None
    wanted = [q, kv, *([sink] if with_sink else [])]
    ours = dsa.train.dense_attention(q, kv, SCALE, starts, ends, sink=sink)
    theirs = dsa.train.sparse_attention(q, kv, as_lists(starts, ends, 9), SCALE, sink=sink)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(gradients_of(*ours, wanted), gradients_of(*theirs, wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_fp64_passes_gradcheck():
    draw = Draw(4)
    q, kv = draw.normal(3, 2, 64).double().requires_grad_(), draw.normal(4, 1, 64).double().requires_grad_()
    starts, ends = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([4, 3, 2], dtype=torch.int32)

    def attend(q, kv):
        return dsa.train.dense_attention(q, kv, SCALE, starts, ends, d_v=64)[0]

    assert torch.autograd.gradcheck(attend, (q, kv), fast_mode=True)


@pytest.mark.parametrize("kind", ["dense", "sparse", "warm-up", "indexer"])
def test_ranks_that_share_the_queries_have_the_gradients_of_one(kind):
    """Context parallel: of six queries two ranks take the first and the last, and those between; tokens' gradients add up."""
    q, kv, starts, ends, _ = leaves()
    draw, lists = Draw(6), as_lists(starts, ends, 9)
    indexer = [draw.normal(*shape).requires_grad_() for shape in ((6, 4, 32), (9, 32), (6, 4))]
    lse = dsa.train.dense_attention(q, kv, SCALE, starts, ends)[1].detach()

    def loss(rows):
        windows = {"starts": starts[rows], "ends": ends[rows]}
        if kind == "dense":
            return dsa.train.dense_attention(q[rows], kv, SCALE, **windows)[0].square().sum()
        if kind == "sparse":
            return dsa.train.sparse_attention(q[rows], kv, lists[rows], SCALE)[0].square().sum()
        columns = windows if kind == "warm-up" else {"indices": lists[rows]}
        own = indexer[0][rows], indexer[1], indexer[2][rows]
        return len(rows) * dsa.train.indexer_loss(q[rows], kv, lse[rows], *own, SCALE, **columns)

    learned = [q, kv] if kind in ("dense", "sparse") else indexer
    whole = torch.autograd.grad(loss(torch.arange(6)), learned)
    parts = [torch.autograd.grad(loss(torch.tensor(rows)), learned) for rows in ([0, 1, 4, 5], [2, 3])]
    for one, *both in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(both), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_checkpointed_and_compiled_gradients_are_the_same(way):
    q, kv, starts, ends, sink = leaves()

    def call(q, kv, sink):
        return dsa.train.dense_attention(q, kv, SCALE, starts, ends, sink=sink)

    torch._dynamo.reset()
    other = torch.compile(call, backend="aot_eager", fullgraph=True)
    if way == "checkpointed":
        other = lambda *x: checkpoint(call, *x, use_reentrant=False)  # noqa: E731
    wanted = gradients_of(*call(q, kv, sink), [q, kv, sink])
    assert all(torch.equal(*pair) for pair in zip(gradients_of(*other(q, kv, sink), [q, kv, sink]), wanted, strict=True))


def test_the_operator_keeps_its_promises_to_torch():
    q, kv, starts, ends, sink = leaves()
    torch.library.opcheck(torch.ops.dsa_codegen.dense_attention_train.default, (q, kv, SCALE, starts, ends, sink, 512))


def test_a_wrong_argument_is_named():
    q, kv, starts, ends, _ = leaves()
    with pytest.raises(InputError, match=r"^starts"):
        dsa.train.dense_attention(q, kv, SCALE, starts.long(), ends)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_bf16_on_a_gpu_is_the_sparse_kernel(heads):
    q, kv, starts, ends, sink = leaves(torch.bfloat16, "cuda", heads=heads)
    ours = dsa.train.dense_attention(q, kv, SCALE, starts, ends, sink=sink)
    theirs = dsa.train.sparse_attention(q, kv, as_lists(starts, ends, 9), SCALE, sink=sink)
    for mine, other in zip(gradients_of(*ours, [q, kv, sink]), gradients_of(*theirs, [q, kv, sink]), strict=True):
        assert (mine.float() - other.float()).norm() < 1e-2 * other.float().norm()
