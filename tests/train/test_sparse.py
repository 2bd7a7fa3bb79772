"""Sparse attention with gradients, as a model calls it: autograd, checkpointing, torch.compile, packed sequences."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.ops.attention_backward import formulas
from dsa_codegen.problem.draw import Draw

SCALE = 0.05


def leaves(queries=6, heads=4, tokens=20, topk=8, sink=True):
    draw = Draw(3)
    q = draw.normal(queries, heads, 576, dtype=torch.bfloat16).requires_grad_()
    kv = draw.normal(tokens, 1, 576, dtype=torch.bfloat16).requires_grad_()
    indices = torch.stack([draw.permutation(tokens + 3)[:topk] for _ in range(queries)])[:, None].int()
    return q, kv, indices, draw.normal(heads).requires_grad_() if sink else None


def gradients_of(q, kv, indices, sink, call, uses_lse=True):
    out, lse = call(q, kv, indices, SCALE, sink=sink)
    weights = torch.linspace(-1, 1, out.shape[-1])
    loss = (out.float() * weights).sum() + (lse.square().sum() if uses_lse else 0)
    return torch.autograd.grad(loss, [q, kv, *([] if sink is None else [sink])])


def autograd_in_fp32(q, kv, indices, sm_scale, sink=None):
    """What autograd makes of the forward's formula: written without the backward's."""
    valid = (indices[:, 0] >= 0) & (indices[:, 0] < len(kv))
    latent = kv[indices[:, 0].clamp(0, len(kv) - 1).long(), 0].float()
    score = torch.einsum("qhd,qkd->qhk", q.float(), latent) * sm_scale
    score = score.masked_fill(~valid[:, None], float("-inf"))
    lse = score.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))
    return torch.einsum("qhk,qkd->qhd", (score - total[..., None]).exp(), latent[..., :512]), lse


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("uses_lse", [False, True], ids=["out", "out, lse"])
def test_gradients_are_autograds(sink, uses_lse):
    tensors = leaves(sink=sink)
    ours = gradients_of(*tensors, dsa.train.sparse_attention, uses_lse)
    theirs = gradients_of(*tensors, autograd_in_fp32, uses_lse)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=0.02 * other.abs().max().item())


def test_what_needs_no_gradient_gets_none_and_forward_is_the_function():
    q, kv, indices, _ = leaves(sink=False)
    out, lse = dsa.train.sparse_attention(q.detach(), kv, indices.long(), SCALE)
    plain = dsa.sparse_attention(q.detach(), kv.detach(), indices, SCALE)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    out.sum().backward()
    assert q.grad is None and kv.grad.abs().sum() > 0


def test_packed_sequences_have_the_gradients_of_each(monkeypatch):
    """Two sequences in one kv: lists shifted by where theirs begins."""
    q, kv, indices, _ = leaves(sink=False)
    indices = indices.clamp(max=9)  # the first ten rows are a sequence, the others another
    both = torch.cat([indices[:3], indices[3:] + 10])
    dq, dkv = gradients_of(q, kv, both, None, dsa.train.sparse_attention)
    for rows, tokens in ((slice(0, 3), slice(0, 10)), (slice(3, 6), slice(10, 20))):
        alone = q.detach()[rows].clone().requires_grad_(), kv.detach()[tokens].clone().requires_grad_()
        part_q, part_kv = gradients_of(*alone, indices[rows], None, dsa.train.sparse_attention)
        torch.testing.assert_close(part_q, dq[rows])
        torch.testing.assert_close(part_kv, dkv[tokens])


def test_checkpointing_gives_the_same_gradients():
    tensors = leaves()

    def kept(*args, sink):
        return checkpoint(lambda *x: dsa.train.sparse_attention(*x, sink=sink), *args, use_reentrant=False)

    for mine, other in zip(gradients_of(*tensors, kept), gradients_of(*tensors, dsa.train.sparse_attention), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("deterministic", [False, True])
def test_compiled_forward_and_backward_are_the_same(deterministic):
    torch._dynamo.reset()
    tensors = leaves()

    def call(*args, sink):
        return dsa.train.sparse_attention(*args, sink=sink, deterministic=deterministic)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for mine, other in zip(gradients_of(*tensors, compiled), gradients_of(*tensors, call), strict=True):
        assert torch.equal(mine, other)


def test_the_deterministic_form_follows_torchs_switch(monkeypatch):
    asked = []
    monkeypatch.setattr("dsa_codegen.train.sparse.inverse_lists", lambda *args: asked.append(args) or (None, None))
    tensors = leaves()
    torch.use_deterministic_algorithms(True)
    try:
        gradients_of(*tensors, dsa.train.sparse_attention)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) == 1
    gradients_of(*tensors, dsa.train.sparse_attention)
    assert len(asked) == 1


def test_the_operator_keeps_its_promises_to_torch():
    q, kv, indices, sink = leaves(queries=2, tokens=9, topk=4)
    operator = torch.ops.dsa_codegen.sparse_attention_train.default
    torch.library.opcheck(operator, (q, kv, indices, SCALE, None, sink, False, 512))


def test_a_wrong_argument_is_named():
    q, kv, indices, sink = leaves()
    with pytest.raises(InputError, match=r"^kv"):
        dsa.train.sparse_attention(q, kv.float(), indices, SCALE, sink=sink)


def test_fp32_on_a_cpu_has_fp32_gradients():
    q, kv, indices, _ = leaves(sink=False)
    wide = q.detach().float().requires_grad_(), kv.detach().float().requires_grad_()
    ours = gradients_of(*wide, indices, None, dsa.train.sparse_attention)
    theirs = gradients_of(*wide, indices, None, autograd_in_fp32)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_gradients_on_a_gpu_are_the_formulas(heads, deterministic):
    draw = Draw(5, "cuda")
    q = draw.normal(300, heads, 576, dtype=torch.bfloat16).requires_grad_()
    kv = draw.normal(900, 1, 576, dtype=torch.bfloat16).requires_grad_()
    sink = draw.normal(heads).requires_grad_()
    indices = draw.uniform(300, 950).topk(256).indices[:, None].int()
    out, lse = dsa.train.sparse_attention(q, kv, indices, SCALE, sink=sink, deterministic=deterministic)
    do = draw.normal(*out.shape, dtype=torch.bfloat16)
    found = torch.autograd.grad(out, [q, kv, sink], do, retain_graph=True)
    again = torch.autograd.grad(out, [q, kv, sink], do)
    wide = [each.detach().float() for each in (q, kv)]
    wanted = formulas.gradients(*wide, indices, SCALE, out.float(), lse, do.float(), sink=sink.detach())
    for mine, other, third in zip(found, wanted, again, strict=True):
        assert (mine.float() - other).norm() < 5e-3 * other.norm()
        assert torch.equal(mine, third) or not deterministic


@pytest.mark.gpu
def test_inductor_and_recomputed_activations_have_the_same_gradients():
    """What a training loop does: the compiler that is torch's default, with kernels of its own around the operator."""
    draw = Draw(6, "cuda")
    q = draw.normal(70, 16, 576, dtype=torch.bfloat16).requires_grad_()
    kv = draw.normal(200, 1, 576, dtype=torch.bfloat16).requires_grad_()
    indices = draw.uniform(70, 220).topk(64).indices[:, None].int()

    def attend(q, kv):
        return dsa.train.sparse_attention(q * 0.5, kv + 1, indices, SCALE, deterministic=True)[0].float().square()

    def recompute(q, kv):
        return checkpoint(attend, q, kv, use_reentrant=False)

    torch._dynamo.reset()
    wanted = torch.autograd.grad(attend(q, kv).sum(), [q, kv])
    for call in (recompute, torch.compile(attend, fullgraph=True), torch.compile(recompute, fullgraph=True)):
        for mine, other in zip(torch.autograd.grad(call(q, kv).sum(), [q, kv]), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())
