"""Dense MLA with lse and gradients, by torch's matrix products: what the warm-up learns from, and what sparse is compared with.

One latent vector per token is key and value of all heads (576 or 512 channels), for which torch's own fused attentions have no
kernel (at most 256 channels) and no lse. Scores of a bounded number of queries are in memory; tokens that none of them sees are
left out, so that a causal batch costs half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.attended import check_scale
from ..ops.attention.problem import D_V
from ..ops.logits import exact
from ..problem import checks
from ..runtime import torch_ops

_BYTES = 1 << 28
"""Of fp32 scores that are in memory at a time."""


def dense_attention(
    q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, *, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(sm_scale · q · kvᵀ) · kv`` over each query's window, with gradients of ``q``, ``kv`` and ``sink``.

    Windows state what each query sees: causal, packed sequences, a rank's part of a context. It reads them on the host (one
    synchronisation a call), so it is no call for a CUDA graph. Every run has the same bits.

    Args:
        q: bf16 [queries, heads, d] (fp32 and fp64 on the CPU too), d 576 or 512.
        kv: [tokens, 1, d] of the same dtype; the first 512 channels are the value.
        sm_scale: factor of the scores.
        starts, ends: int32 [queries], windows [start, end).
        sink: fp32 [heads], a logit that joins the softmax's denominator; lse stays as it is.

    Returns:
        out [queries, heads, 512] and lse fp32 [queries, heads]. A query without a token gets 0, -inf.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    q = checks.tensor("q", q, (None, None, None), checks.floating(q))
    kv = checks.tensor("kv", kv, (None, 1, q.shape[2]), q.dtype, like=q)
    for name, value in (("starts", starts), ("ends", ends)):
        checks.tensor(name, value, (q.shape[0],), torch.int32, like=q)
    if sink is not None:
        checks.tensor("sink", sink, (q.shape[1],), torch.float32, like=q)
    check_scale(sm_scale)
    return torch.ops.dsa_codegen.dense_attention_train(q, kv, sm_scale, starts, ends, sink)


@torch.library.custom_op(f"{torch_ops.NAMESPACE}::dense_attention_train", mutates_args=())
def _attend(q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = q.new_zeros(*q.shape[:2], D_V), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    for rows, tokens, seen in _chunks(q, len(kv), starts, ends):
        score = _scores(q[rows], kv[tokens, 0], seen, sm_scale)
        own = score.logsumexp(-1)
        lse[rows] = own.float()
        p = _softmax(score, _total(own, sink))
        out[rows] = _product(p.to(q.dtype).flatten(0, 1), kv[tokens, 0, :D_V]).view_as(out[rows]).to(q.dtype)
    return out, lse


@_attend.register_fake
def _fake(q: Tensor, kv: Tensor, sm_scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], D_V), q.new_empty(q.shape[:2], dtype=torch.float32)


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
    total = _total(lse, sink)
    dq, sums = torch.zeros_like(q), exact(torch.zeros_like(kv[:, 0]))
    for rows, tokens, seen in _chunks(q, len(kv), starts, ends):
        ask, push, latent = q[rows].flatten(0, 1), do[rows].flatten(0, 1), kv[tokens, 0]
        score = _scores(q[rows], latent, seen, sm_scale)
        p = _softmax(score, total[rows])
        slope = p * (_product(push, latent[:, :D_V].T).view_as(p) - delta[rows, :, None])
        if dlse is not None:
            slope += dlse[rows, :, None] * _softmax(score, lse[rows])
        p, slope = p.to(q.dtype).flatten(0, 1), (slope * sm_scale).to(q.dtype).flatten(0, 1)
        dq[rows] = _product(slope, latent).view_as(dq[rows]).to(q.dtype)
        sums[tokens] += _product(slope.T, ask)
        sums[tokens, :D_V] += _product(p.T, push)
    dsink = lse.new_zeros(0) if sink is None else -(torch.exp(sink - total) * delta).sum(0).float()
    return dq, sums.to(kv.dtype)[:, None], dsink


@_gradients.register_fake
def _fake_gradients(
    q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, sink: Tensor | None, *rest: Any
) -> Any:
    dsink = q.new_empty(0, dtype=torch.float32) if sink is None else torch.empty_like(sink)
    return torch.empty_like(q), torch.empty_like(kv), dsink


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, ctx.sm_scale, starts, ends, sink = inputs
    ctx.save_for_backward(q, kv, starts, ends, sink, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, kv, starts, ends, sink, out, lse = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do.contiguous()
    gradients = torch.ops.dsa_codegen.dense_attention_backward
    dq, dkv, dsink = gradients(q, kv, ctx.sm_scale, starts, ends, sink, out, lse, do, dlse)
    return dq, dkv, None, None, None, None if sink is None else dsink


_attend.register_autograd(_backward, setup_context=_keep)


def _chunks(q: Tensor, tokens: int, starts: Tensor, ends: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some queries at a time: (rows, the tokens that any of them sees, bool [rows, those tokens])."""
    step = max(1, _BYTES // (4 * q.shape[1] * max(tokens, 1)))
    windows = torch.stack([starts, ends]).clamp(0, tokens)
    on_host = windows.cpu()
    for first in range(0, len(q), step):
        rows = slice(first, first + step)
        begin, end = on_host[:, rows]
        low, high = int(begin.min()), int(end.max())
        if low < high and bool((begin < end).any()):
            token = torch.arange(low, high, device=q.device)
            begin, end = windows[:, rows, None]
            yield rows, slice(low, high), (token >= begin) & (token < end)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32 (fp64 of fp64), of operands as they are."""
    if a.dtype is torch.bfloat16 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return exact(a) @ exact(b)


def _scores(q: Tensor, latent: Tensor, seen: Tensor, sm_scale: float) -> Tensor:
    score = _product(q.flatten(0, 1), latent.T).view(*q.shape[:2], -1)
    return score.mul_(sm_scale).masked_fill_(~seen[:, None], -math.inf)


def _softmax(score: Tensor, total: Tensor) -> Tensor:
    """``exp(score - total)``, 0 for a query without a token, whose total may be -inf."""
    return torch.exp(score - total.clamp(min=torch.finfo(torch.float32).min)[..., None])


def _total(lse: Tensor, sink: Tensor | None) -> Tensor:
    return lse if sink is None else torch.logaddexp(lse, sink.to(lse).expand_as(lse))
