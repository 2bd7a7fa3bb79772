"""Training an enabled model: attention with gradients, and an indexer that learns from it in the same backward pass.

What the model returns stays as it was: an indexer's loss joins the backward pass where its layer's output does, as losses that
balance experts do, so that any trainer which calls ``backward`` trains the indexers too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import train
from ...errors import InputError
from . import attend, families
from .families import Family

_READ, _LOSS = "dsa_read", "dsa_loss"


@dataclass(frozen=True)
class Lesson:
    """How an enabled layer is trained."""

    stage: str
    """"dense", "warm-up" or "sparse", as in ``train.run_layer``."""
    weight: float
    """Of the indexer's loss beside the model's own."""
    scores: str

    @property
    def applies(self) -> bool:
        """Whether a call is computed here; a sparse model without gradients does what it does when it serves."""
        return self.stage != "sparse" or torch.is_grad_enabled()

    @property
    def teaches(self) -> bool:
        """Whether indexers learn in a call."""
        return self.stage != "dense" and torch.is_grad_enabled()

    def read(self, family: Family, indexer: Any, hidden_states: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
        """The indexer's (queries, keys, weights); with gradients of its own parameters alone, kept for the attention's turn."""
        hidden, resid, rotation = hidden_states.detach(), given.get("q_resid"), given["position_embeddings"]
        resid = None if resid is None else resid.detach()
        with torch.set_grad_enabled(self.teaches):
            keys = families.keys(family, indexer, hidden, rotation)
            queries = families.queries(family, indexer, hidden, resid, rotation, given.get("position_ids"))
            found = queries, keys, families.weights(indexer, hidden)
        if self.teaches:
            indexer.__dict__[_READ] = found
        return tuple(each.detach() for each in found)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Tensor,
        scaling: float,
        indices: Tensor | None,
        sink: Tensor | None,
    ) -> Tensor:
        """As ``attend.forward``, with gradients: over the chosen tokens or over whole windows.

        Returns:
            [batch, queries, heads, v_head_dim].

        Raises:
            InputError: a cache holds earlier tokens: who learns from them needs them in the same call.
        """
        batch, heads, length, _ = query.shape
        dtype = torch.bfloat16 if query.is_cuda else query.dtype
        down, up = attend.halves(module, heads)
        q = attend.absorbed(query, down).flatten(0, 1).to(dtype).contiguous()
        kv = attend.whole_rows(key, value).flatten(0, 2)[:, None].to(dtype).contiguous()
        first = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None, None] * key.shape[2]
        columns: dict[str, Tensor] = {}
        if self.stage == "sparse":
            assert indices is not None
            columns["indices"] = torch.where(indices < 0, -1, indices + first).flatten(0, 1)[:, None].contiguous()
            out, lse = train.sparse_attention(q, kv, columns["indices"], scaling, sink=sink)
        else:
            shifted = (window.expand(batch, 1, length, 2)[:, 0] + first).flatten(0, 1).int()
            columns["starts"], columns["ends"] = (bound.contiguous() for bound in shifted.unbind(-1))
            out, lse = train.dense_attention(q, kv, scaling, columns["starts"], columns["ends"], sink=sink)
        out = _taught(module, self, (q, kv, lse), out, columns, scaling, sink)
        rank = down.shape[-1]
        return torch.einsum("bqhl,hvl->bqhv", out.view(batch, length, heads, -1)[..., :rank].to(query.dtype), up)


def _taught(
    module: Any,
    lesson: Lesson,
    attended: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    columns: dict[str, Tensor],
    scaling: float,
    sink: Tensor | None,
) -> Tensor:
    """``out``, in whose backward pass the layer's indexer learns; of layers that share another's choice just that."""
    indexer, (q, kv, lse) = module.indexer, attended
    found = None if indexer is None else indexer.__dict__.pop(_READ, None)
    if found is None:
        return out
    index_q, index_k, weights = (each.flatten(0, 1) for each in found)
    if len(index_k) != len(kv):
        raise InputError("past_key_values", f"{len(kv)} tokens, {len(index_k)} of them new", "all of a text in one call")
    rows = index_q.to(q.dtype), index_k.to(q.dtype), weights
    given: dict[str, Any] = dict(columns)
    loss = train.indexer_loss(q, kv, lse, *rows, scaling, sink=sink, scores=lesson.scores, **given)
    loss = loss * (len(q) / lse.isfinite().any(-1).sum().clamp(min=1))  # padding teaches nothing
    module.__dict__[_LOSS] = loss.detach()
    taught: Tensor = _Taught.apply(out, loss, lesson.weight)
    return taught


class _Taught(torch.autograd.Function):
    """The identity of ``out``; whoever asks for its gradient gets that of ``weight · loss`` too."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, (loss.dtype, loss.device)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad, torch.full((), ctx.weight, dtype=dtype, device=device), None


def indexer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What the warm-up trains, and nothing else: the parameters of an enabled model's indexers."""
    for layer in model.modules():
        indexer = layer.indexer if "dsa_before" in layer.__dict__ else None
        if isinstance(indexer, nn.Module):
            yield from indexer.parameters()


def indexer_loss(model: nn.Module) -> Tensor | None:
    """The mean of the layers' losses of the last call with gradients, without gradients, for a log; None where none learned."""
    found = [layer.__dict__[_LOSS] for layer in model.modules() if _LOSS in layer.__dict__]
    return torch.stack(found).mean() if found else None


def forget(layer: Any) -> None:
    """Remove what a lesson left on a layer."""
    for owner in (layer, layer.indexer):
        for name in (_READ, _LOSS) if owner is not None else ():
            owner.__dict__.pop(name, None)
