"""Sparse attention and its gradients, written out: the oracle of the backward, in the dtype of its arguments (fp64 too).

With ``s[h,i] = sm_scale · q[h] · kv[i]``, ``total[h] = ln(Σ_i exp(s[h,i]) + exp(sink[h]))``, ``p = exp(s - total)`` and
``delta[h] = out[h] · do[h]``::

    ds[h,i] = p[h,i] · (do[h] · v[i] - delta[h]) + dlse[h] · exp(s[h,i] - lse[h])
    dq[h]   = sm_scale · Σ_i ds[h,i] · kv[i]
    dkv[i] += sm_scale · Σ_h ds[h,i] · q[h],   dkv[i, :d_v] += Σ_h p[h,i] · do[h]
    dsink[h] = -Σ_queries exp(sink[h] - total[h]) · delta[h]

A sink weighs on the softmax but has no value: it is a token whose value is 0, so its ``do · v`` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem.channels import D_V
from ..inverse_lists import listed

_CHUNK = 64  # queries at a time: their tokens are gathered


class Gradients(NamedTuple):
    """Of ``q`` [queries, heads, d], ``kv`` [tokens, 1, d] and ``sink`` [heads] (None where there is none)."""

    dq: Tensor
    dkv: Tensor
    dsink: Tensor | None


def attend(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    d_v: int = D_V,
) -> tuple[Tensor, Tensor]:
    """(out [queries, heads, d_v], lse [queries, heads]) in the dtype of ``q``."""
    out, lse = q.new_zeros(*q.shape[:2], d_v), q.new_full(q.shape[:2], -math.inf)
    for rows, valid, latent in _gathered(q, kv, indices, lengths):
        score = _scores(q[rows], latent, valid, sm_scale)
        lse[rows] = score.logsumexp(-1)
        out[rows] = torch.einsum("qhk,qkd->qhd", _softmax(score, _total(lse[rows], sink)), latent[..., :d_v])
    return out, lse


def gradients(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
) -> Gradients:
    """The formulas above, in the dtype of ``q``, from the forward's results ``out`` and ``lse`` and their gradients."""
    delta, d_v = (out * do).sum(-1), do.shape[-1]
    total = _total(lse, sink)
    dq, dkv = torch.zeros_like(q), torch.zeros_like(kv)
    for rows, valid, latent in _gathered(q, kv, indices, lengths):
        score = _scores(q[rows], latent, valid, sm_scale)
        p = _softmax(score, total[rows])
        ds = p * (torch.einsum("qhd,qkd->qhk", do[rows], latent[..., :d_v]) - delta[rows, :, None])
        if dlse is not None:
            ds += dlse[rows, :, None] * _softmax(score, lse[rows])
        ds *= sm_scale
        dq[rows] = torch.einsum("qhk,qkd->qhd", ds, latent)
        added = torch.einsum("qhk,qhd->qkd", ds, q[rows])
        added[..., :d_v] += torch.einsum("qhk,qhd->qkd", p, do[rows])
        dkv[:, 0].index_add_(0, indices[rows, 0][valid].long(), added[valid])
    dsink = None if sink is None else -(torch.exp(sink - total) * delta).sum(0)
    return Gradients(dq, dkv, dsink)


def _gathered(q: Tensor, kv: Tensor, indices: Tensor, lengths: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some queries at a time: (rows, valid [rows, topk], latent [rows, topk, d] with zeros where no token is named)."""
    for first in range(0, len(q), _CHUNK):
        rows = slice(first, first + _CHUNK)
        valid = listed(indices[rows], len(kv), None if lengths is None else lengths[rows])
        latent = kv.new_zeros(*valid.shape, kv.shape[-1])
        latent[valid] = kv[indices[rows, 0][valid].long(), 0]
        yield rows, valid, latent


def _scores(q: Tensor, latent: Tensor, valid: Tensor, sm_scale: float) -> Tensor:
    return (torch.einsum("qhd,qkd->qhk", q, latent) * sm_scale).masked_fill(~valid[:, None], -math.inf)


def _softmax(score: Tensor, total: Tensor) -> Tensor:
    """``exp(score - total)``, 0 for a query without a token, whose total may be -inf."""
    return torch.exp(score - total[..., None]).masked_fill(score == -math.inf, 0.0)


def _total(lse: Tensor, sink: Tensor | None) -> Tensor:
    return lse if sink is None else torch.logaddexp(lse, sink.to(lse).expand_as(lse))
