"""Sparse MLA with gradients: an operator of torch.library, so that autograd, checkpointing and torch.compile all see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..ops.inverse_lists import inverse_lists
from ..problem.channels import D_V
from ..runtime import torch_ops


def sparse_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    deterministic: bool | None = None,
    d_v: int = D_V,
) -> tuple[Tensor, Tensor]:
    """``dsa_codegen.sparse_attention`` with gradients of ``q``, ``kv`` and ``sink``, from those of ``out`` and ``lse``.

    The lists are constants: which tokens are chosen has no gradient; the indexer learns by ``indexer_loss``. Sequences that are
    packed into one ``kv`` need nothing more: the lists hold numbers of its rows. Under ``torch.utils.checkpoint`` the forward
    runs again, with the same bits.

    Args:
        q: bf16 [queries, heads, d] (fp32 and fp64 on the CPU too); heads 1 to 128, d from ``d_v`` to d_v + 128.
        kv: [tokens, 1, d] of the same dtype; the first ``d_v`` channels are the value.
        indices: int32 or int64 [queries, 1, topk], invalid ones (-1, or >= tokens) anywhere; no token twice in a list.
        sm_scale: factor of the scores.
        lengths: int32 [queries]; only so many entries of a row count.
        sink: fp32 [heads], a logit that joins the softmax's denominator.
        deterministic: add up the gradient of ``kv`` in a fixed order, so that it has the same bits in every run, instead of by
            atomics. None follows ``torch.use_deterministic_algorithms``. What it costs stands in docs/training.md.
        d_v: 64 to 512 in steps of 16, as in the forward.

    Returns:
        out [queries, heads, d_v] and lse fp32 [queries, heads], as in the forward.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    narrow = functions.as_int32(indices)
    return torch.ops.dsa_codegen.sparse_attention_train(q, kv, narrow, sm_scale, lengths, sink, deterministic, d_v)


@torch.library.custom_op(f"{torch_ops.NAMESPACE}::sparse_attention_train", mutates_args=())
def _attend(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    lengths: Tensor | None,
    sink: Tensor | None,
    deterministic: bool,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return functions.sparse_attention(q, kv, indices, sm_scale, lengths=lengths, sink=sink, d_v=d_v)


@_attend.register_fake
def _fake(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], rest[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, indices, ctx.sm_scale, lengths, sink, ctx.deterministic, _ = inputs
    ctx.save_for_backward(q, kv, indices, *output, lengths, sink)
    ctx.set_materialize_grads(False)  # where lse is not used, its gradient is None, not a tensor of zeros


def gradients(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    *,
    dlse: Tensor | None = None,
    lengths: Tensor | None = None,
    sink: Tensor | None = None,
    deterministic: bool = False,
) -> list[Tensor]:
    """[dq, dkv] or [dq, dkv, dsink]: what autograd gets, for whoever calls forward and backward himself.

    Args:
        out, lse: the forward's results. do, dlse: their gradients, [queries, heads, d_v] and fp32 [queries, heads].
        The others are as in ``sparse_attention``, indices int32.
    """
    lists = inverse_lists(indices, kv.shape[0], kv.shape[-1], lengths) if deterministic else (None, None)
    operator = torch_ops.function("sparse_attention_backward")
    found: list[Tensor] = operator(q, kv, indices, sm_scale, out, lse, do, dlse, lengths, sink, *lists)
    return found


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, kv, indices, out, lse, lengths, sink = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do.to(out.dtype).contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    options = {"dlse": dlse, "lengths": lengths, "sink": sink, "deterministic": ctx.deterministic}
    dq, dkv, *rest = gradients(q, kv, indices, ctx.sm_scale, out, lse, do, **options)
    return dq, dkv, None, None, None, rest[0] if rest else None, None, None


_attend.register_autograd(_backward, setup_context=_keep)
