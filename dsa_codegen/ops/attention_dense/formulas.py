"""Dense attention over windows, some queries at a time: the reference, and the parts of which its backward is made."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...problem.channels import D_V
from ..logits import exact

BYTES = 1 << 28
"""Of fp32 scores that are in memory at a time."""


def attend(
    q: Tensor, kv: Tensor, sm_scale: float, starts: Tensor, ends: Tensor, sink: Tensor | None, d_v: int = D_V
) -> tuple[Tensor, Tensor]:
    """(out [queries, heads, d_v], lse [queries, heads]) in fp32, or in fp64 where ``q`` and ``kv`` came so."""
    q, kv = exact(q), exact(kv)
    out, lse = q.new_zeros(*q.shape[:2], d_v), q.new_full(q.shape[:2], -math.inf)
    for rows, tokens, seen in chunks(q, len(kv), starts, ends):
        score = scores(q[rows], kv[tokens, 0], seen, sm_scale)
        lse[rows] = score.logsumexp(-1)
        out[rows] = torch.einsum("qhk,kd->qhd", softmax(score, with_sink(lse[rows], sink)), kv[tokens, 0, :d_v])
    return out, lse


def chunks(q: Tensor, tokens: int, starts: Tensor, ends: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some queries at a time: (rows, the tokens that any of them sees, bool [rows, those tokens]); one synchronisation."""
    step = max(1, BYTES // (4 * q.shape[1] * max(tokens, 1)))
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32 (fp64 of fp64), of operands as they are."""
    if a.dtype is torch.bfloat16 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return exact(a) @ exact(b)


def scores(q: Tensor, latent: Tensor, seen: Tensor, sm_scale: float) -> Tensor:
    """[rows, heads, tokens], -inf where a query does not see a token."""
    score = product(q.flatten(0, 1), latent.T).view(*q.shape[:2], -1)
    return score.mul_(sm_scale).masked_fill_(~seen[:, None], -math.inf)


def softmax(score: Tensor, total: Tensor) -> Tensor:
    """``exp(score - total)``, 0 for a query without a token, whose total may be -inf."""
    return torch.exp(score - total.clamp(min=torch.finfo(torch.float32).min)[..., None])


def with_sink(lse: Tensor, sink: Tensor | None) -> Tensor:
    """The logarithm of the softmax's denominator."""
    return lse if sink is None else torch.logaddexp(lse, sink.to(lse).expand_as(lse))
