"""The indexer's loss and its gradients, written out: the oracle, in its arguments' dtype (DeepSeek-V3.2 report, section 2).

For a query with tokens i (its window in the warm-up, its chosen tokens in sparse training) and the attention's heads h::

    target[i] = Σ_h exp(s[h,i] - total[h]) / Σ_ih exp(s[h,i] - total[h]),   s[h,i] = sm_scale · q[h] · kv[i]
    loss      = KL(target ‖ softmax(I)) = Σ_i target[i] · (ln target[i] - I[i] + ln Σ_j exp(I[j]))
    dI[i]     = softmax(I)[i] - target[i]

and with ``x[j,i] = iq[j] · ik[i]``, ``I[i] = Σ_j w[j] · ReLU(x[j,i])`` (or ``Σ_j ReLU(x[j,i] + w[j])``)::

    g[j,i]  = dI[i] · w[j] where x[j,i] > 0          (dI[i] where x[j,i] + w[j] > 0)
    diq[j]  = Σ_i g[j,i] · ik[i],   dik[i] += Σ_j g[j,i] · iq[j]
    diw[j]  = Σ_i dI[i] · ReLU(x[j,i])               (Σ_i g[j,i])

The attention itself gets no gradient: the indexer learns from it, not the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..inverse_lists import listed

_CHUNK = 16  # queries at a time


class Learned(NamedTuple):
    """Of each query the loss, and the gradients of their sum."""

    loss: Tensor
    diq: Tensor
    dik: Tensor
    diw: Tensor


class Columns(NamedTuple):
    """Where each query's tokens are: ``indices`` [queries, 1, topk] or windows ``starts``, ``ends`` [queries]."""

    indices: Tensor | None
    starts: Tensor | None
    ends: Tensor | None

    def of(self, rows: slice, tokens: int) -> tuple[Tensor, Tensor]:
        """(token, valid), each [rows, columns]; invalid ones name token 0."""
        if self.indices is not None:
            valid = listed(self.indices[rows], tokens)
            return torch.where(valid, self.indices[rows, 0], 0).long(), valid
        assert self.starts is not None and self.ends is not None
        token = torch.arange(tokens, device=self.ends.device).expand(len(self.ends[rows]), -1)
        return token, (token >= self.starts[rows, None]) & (token < self.ends[rows, None])


def learn(
    q: Tensor,
    kv: Tensor,
    total: Tensor,
    iq: Tensor,
    ik: Tensor,
    iw: Tensor,
    sm_scale: float,
    columns: Columns,
    score: str = "weighted_relu",
) -> Learned:
    """The formulas above, in the dtype of ``iq``."""
    loss, found = iq.new_zeros(len(q)), Learned(iq.new_zeros(0), *(torch.zeros_like(each) for each in (iq, ik, iw)))
    for rows, token, valid in _parts(len(q), len(kv), columns):
        latent = kv[token, 0]
        weight = torch.exp(torch.einsum("qhd,qkd->qhk", q[rows], latent) * sm_scale - total[rows, :, None])
        target = weight.masked_fill(~valid[:, None], 0.0).sum(1)
        target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        key, w = ik[token], iw[rows, :, None]
        x = torch.einsum("qjd,qkd->qjk", iq[rows], key) + (w if score == "relu_bias" else 0)
        scores = (x.relu() * (w if score == "weighted_relu" else 1)).sum(1).masked_fill(~valid, -math.inf)
        log_softmax = (scores - scores.logsumexp(-1, keepdim=True)).masked_fill(~valid, 0.0)
        loss[rows] = torch.special.xlogy(target, target).sum(-1) - (target * log_softmax).sum(-1)
        slope = (log_softmax.exp() - target).masked_fill(~valid, 0.0)[:, None]
        g = slope * (x > 0) * (w if score == "weighted_relu" else 1)
        found.diq[rows] = torch.einsum("qjk,qkd->qjd", g, key)
        found.dik.index_add_(0, token[valid], torch.einsum("qjk,qjd->qkd", g, iq[rows])[valid])
        found.diw[rows] = (slope * x.relu() if score == "weighted_relu" else g).sum(-1)
    return found._replace(loss=loss)


def _parts(queries: int, tokens: int, columns: Columns) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for first in range(0, queries if tokens else 0, _CHUNK):
        rows = slice(first, first + _CHUNK)
        yield rows, *columns.of(rows, tokens)
