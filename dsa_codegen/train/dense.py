"""Dense MLA with gradients: what the warm-up learns from, and what sparse training is compared with.

The forward is a kernel of this package; the backward is made of torch's matrix products, with the scores of a bounded number of
queries in memory. Tokens that none of these queries sees are left out, so that a causal batch costs half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.attention_dense.formulas import chunks, product, scores, softmax, with_sink
from ..ops.logits import exact
from ..problem.channels import D_V
from ..runtime import torch_ops


def dense_attention(
    q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, *, sink: Tensor | None = None, d_v: int = D_V
) -> tuple[Tensor, Tensor]:
    """``softmax(sm_scale · q · kvᵀ) · kv`` over each query's window, with gradients of ``q``, ``kv`` and ``sink``.

    Windows state what each query sees: causal, packed sequences, a rank's part of a context. Every run has the same bits. The
    backward reads the windows on the host (one synchronisation a call).

    Args:
        q: bf16 [queries, heads, d] (fp32 and fp64 on the CPU too), d from ``d_v`` to d_v + 128 in steps of 16.
        kv: [tokens, 1, d] of the same dtype; the first ``d_v`` channels are the value.
        sm_scale: factor of the scores.
        starts, ends: int32 [queries], windows [start, end).
        sink: fp32 [heads], a logit that joins the softmax's denominator; lse stays as it is.
        d_v: 64 to 512 in steps of 16.

    Returns:
        out [queries, heads, d_v] and lse fp32 [queries, heads]. A query without a token gets 0, -inf.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    return torch.ops.dsa_codegen.dense_attention_train(q, kv, sm_scale, starts, ends, sink, d_v)


@torch.library.custom_op(f"{torch_ops.NAMESPACE}::dense_attention_train", mutates_args=())
def _attend(
    q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, sink: Tensor | None, d_v: int
) -> tuple[Tensor, Tensor]:
    return torch_ops.function("dense_attention")(q, kv, sm_scale, starts, ends, sink, d_v)


@_attend.register_fake
def _fake(q: Tensor, kv: Tensor, sm_scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], rest[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op(f"{torch_ops.NAMESPACE}::dense_attention_backward", mutates_args=())
def _gradients(
    q: Tensor,
    kv: Tensor,
    sm_scale: float,
    starts: Tensor,
    ends: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dkv, dsink or an empty tensor), by the formulas of the sparse backward."""
    delta = (exact(out) * exact(do)).sum(-1)
    total, d_v = with_sink(lse, sink), do.shape[-1]
    dq, sums = torch.zeros_like(q), exact(torch.zeros_like(kv[:, 0]))
    for rows, tokens, seen in chunks(q, len(kv), starts, ends):
        ask, push, latent = q[rows].flatten(0, 1), do[rows].flatten(0, 1), kv[tokens, 0]
        score = scores(q[rows], latent, seen, sm_scale)
        p = softmax(score, total[rows])
        slope = p * (product(push, latent[:, :d_v].T).view_as(p) - delta[rows, :, None])
        if dlse is not None:
            slope += dlse[rows, :, None] * softmax(score, lse[rows])
        p, slope = p.to(q.dtype).flatten(0, 1), (slope * sm_scale).to(q.dtype).flatten(0, 1)
        dq[rows] = product(slope, latent).view_as(dq[rows]).to(q.dtype)
        sums[tokens] += product(slope.T, ask)
        sums[tokens, :d_v] += product(p.T, push)
    dsink = lse.new_zeros(0) if sink is None else -(torch.exp(sink - total) * delta).sum(0).float()
    return dq, sums.to(kv.dtype)[:, None], dsink


@_gradients.register_fake
def _fake_gradients(
    q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, sink: Tensor | None, *rest: Any
) -> Any:
    dsink = q.new_empty(0, dtype=torch.float32) if sink is None else torch.empty_like(sink)
    return torch.empty_like(q), torch.empty_like(kv), dsink


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, ctx.sm_scale, starts, ends, sink, _ = inputs
    ctx.save_for_backward(q, kv, starts, ends, sink, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, kv, starts, ends, sink, out, lse = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do.contiguous()
    gradients = torch.ops.dsa_codegen.dense_attention_backward
    dq, dkv, dsink = gradients(q, kv, ctx.sm_scale, starts, ends, sink, out, lse, do, dlse)
    return dq, dkv, None, None, None, None if sink is None else dsink, None


_attend.register_autograd(_backward, setup_context=_keep)
