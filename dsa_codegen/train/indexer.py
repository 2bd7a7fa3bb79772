"""The indexer's loss: how far its softmax is from the attention's distribution, over whole windows or over chosen tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..errors import InputError
from ..ops.inverse_lists import inverse_lists, listed
from ..problem import checks
from ..problem.presets import PRECISIONS
from ..runtime import torch_ops


def indexer_loss(
    q: Tensor,
    kv: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    sm_scale: float,
    *,
    indices: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    sink: Tensor | None = None,
    score: str = "weighted_relu",
    scores: str = "bf16",
    deterministic: bool | None = None,
) -> Tensor:
    """``mean_t KL(target_t ‖ softmax(I_t))`` with gradients of the indexer alone (DeepSeek-V3.2 report, section 2).

    ``target`` is the attention's distribution over a query's tokens, summed over heads and normalised; ``I`` are the indexer's
    scores. With windows a query learns from all of its tokens (warm-up), with lists from the chosen ones (sparse training). No
    matrix of queries x tokens is in memory: at most 256 MB of rows are.

    Args:
        q, kv: bf16 [queries, heads, d] and [tokens, 1, d], as the attention had them; they get no gradient.
        lse: fp32 [queries, heads], from ``dense_attention`` or ``sparse_attention`` over the same tokens.
        index_q: [queries, index_heads, index_head_dim] of the same dtype; up to 64 heads, head_dim 32, 64 or 128.
        index_k: [tokens, index_head_dim].
        index_weights: fp32 or bf16 [queries, index_heads], with whatever scales the scores folded in.
        sm_scale: factor of the attention's scores.
        indices, lengths: int32 or int64 [queries, 1, topk], as in ``sparse_attention``.
        starts, ends: int32 [queries], windows in place of lists.
        sink: fp32 [heads], where the attention had sinks: a head that gave them weight counts less.
        score: "weighted_relu" or "relu_bias".
        scores: "bf16", or "fp8": index_q and index_k are rounded to e4m3 with a scale per row, as in serving, and gradients go
            straight through the rounding.
        deterministic: as in ``sparse_attention``; with windows every run has the same bits anyway.

    Returns:
        The loss, fp32 and without dimensions. A query without tokens counts as 0.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    checks.one_of("scores", scores, PRECISIONS)
    checks.check_kind("lse", lse, "Tensor")
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    total = lse.detach() if sink is None else torch.logaddexp(lse.detach(), sink.detach().expand_as(lse))
    attention = q.detach(), kv.detach(), total
    indexer = index_q, index_k, index_weights.float()
    columns = _lists(indices, lengths, kv.shape[0]), starts, ends
    loss, *_ = torch.ops.dsa_codegen.indexer_loss_train(
        *attention, *indexer, sm_scale, *columns, score, scores == "fp8", deterministic
    )
    return loss / max(q.shape[0], 1)


def _lists(indices: Tensor | None, lengths: Tensor | None, tokens: int) -> Tensor | None:
    """The lists as int32, with -1 behind their lengths."""
    if indices is None:
        if lengths is not None:
            raise InputError("lengths", "lengths without lists", "None: windows have starts and ends")
        return None
    indices = functions.as_int32(indices)
    return indices if lengths is None else torch.where(listed(indices, tokens, lengths)[:, None], indices, -1)


@torch.library.custom_op(f"{torch_ops.NAMESPACE}::indexer_loss_train", mutates_args=())
def _learn(
    q: Tensor,
    kv: Tensor,
    total: Tensor,
    iq: Tensor,
    ik: Tensor,
    iw: Tensor,
    sm_scale: float,
    indices: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    score: str,
    fp8: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the sum of the queries' losses, its gradients): one pass over the scores gives both."""
    with torch.no_grad():
        iq, ik, iw = (each.contiguous() for each in (iq, ik, iw))
        if fp8:
            iq, ik = rounded_to_fp8(iq), rounded_to_fp8(ik)
        in_order = deterministic and indices is not None
        lists = inverse_lists(indices, len(kv), ik.shape[1]) if in_order and indices is not None else (None, None)
        operator = torch_ops.function("indexer_loss")
        loss, *gradients = operator(q, kv, total, iq, ik, iw, sm_scale, indices, starts, ends, score, *lists)
        return loss.sum(), *gradients


@_learn.register_fake
def _fake(q: Tensor, kv: Tensor, total: Tensor, iq: Tensor, ik: Tensor, iw: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (iq, ik, iw)]
    return iw.new_empty(()), *gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *of_gradients: Any) -> tuple[Tensor | None, ...]:
    found = [None if upstream is None else each * upstream.to(each.dtype) for each in ctx.saved_tensors]
    return (None, None, None, *found, *[None] * 7)


_learn.register_autograd(_backward, setup_context=_keep)


def rounded_to_fp8(x: Tensor) -> Tensor:
    """What serving makes of queries and keys of the indexer: e4m3 with a scale per row, back in the dtype of ``x``.

    bf16 holds an e4m3 number times a scale to 2^-9 of it, where e4m3 itself rounds to 2^-4.
    """
    values, scales = functions.quantize_index_k(x.detach().bfloat16().reshape(-1, x.shape[-1]))
    return (values.float() * scales[:, None]).to(x.dtype).view(x.shape)
