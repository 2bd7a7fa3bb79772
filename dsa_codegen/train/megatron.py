"""Megatron-core 0.19: its hooks for fused sparse attention, served by this package.

Megatron imports the module that its ``dsa_kernel_backend`` names and calls these functions in it; None sends it to its own
unfused code. ``enable`` puts this module in the place of "tilelang"::

    from dsa_codegen.train import megatron
    megatron.enable()  # then run with dsa_kernel_backend="tilelang"

Not served (None): scores without ReLU, a target summed over tensor-parallel ranks, packed context parallelism, MLA that is not
absorbed, and shapes that no kernel here has.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..choice import index_select
from ..errors import InputError
from ..problem import channels
from .indexer import indexer_loss
from .sparse import sparse_attention

__all__ = ["enable", "run_fused_absorbed_sparse_attention", "run_fused_qk_topk", "run_fused_qk_topk_with_loss"]

_HOOKS = "megatron.core.transformer.experimental_attention_variant.dsa_kernels"


def enable(backend: str = "tilelang") -> None:
    """Let Megatron's ``dsa_kernel_backend`` of that name load this module; before it loads its own.

    Raises:
        ImportError: Megatron-core is not installed, or has no such hooks.
    """
    importlib.import_module(_HOOKS)._BACKEND_MODULE_NAME_BY_BACKEND[backend] = __name__


def run_fused_qk_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    index_topk: int,
    starts: Tensor,
    ends: Tensor,
    block_size: int,
    use_relu: bool = True,
    use_local_indexer_varlen: bool = False,
    single_packed_thd_sequence: bool = False,
    local_packed_cp_rank: int = 0,
    local_packed_cp_query_start: int = 0,
    local_packed_cp_query_len: int | None = None,
    packed_seq_params: Any = None,
    cp_size: int = 1,
) -> tuple[Tensor, None] | None:
    """(chosen tokens int32 [batch, queries, topk], -1 where there are fewer; None), or None.

    Args:
        q: bf16 [queries, batch, heads, head_dim].
        k: bf16 [tokens, batch, head_dim].
        weights: [queries, batch, heads].
        starts, ends: int32 [queries], windows that all of the batch share.
        The others are Megatron's; ``block_size`` bounds its own memory, ours is bounded anyway.
    """
    if not _indexer_served(q, k, weights, index_topk, use_relu):
        return None
    if use_local_indexer_varlen and packed_seq_params is not None and cp_size > 1:
        return None
    windows = starts.int().contiguous(), ends.int().contiguous()
    parts = [_choose(q[:, i], k[:, i], weights[:, i], *windows, index_topk) for i in range(q.shape[1])]
    return torch.stack(parts)[..., : min(index_topk, len(k))], None


def run_fused_qk_topk_with_loss(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    index_topk: int,
    starts: Tensor,
    ends: Tensor,
    block_size: int,
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    loss_coeff: float,
    pg_collection: Any,
    query_valid_rows: Tensor | None = None,
    calculate_per_token_loss: bool = False,
    use_relu: bool = True,
    config: Any = None,
    use_local_indexer_varlen: bool = False,
    single_packed_thd_sequence: bool = False,
    local_packed_cp_rank: int = 0,
    local_packed_cp_query_start: int = 0,
    local_packed_cp_query_len: int | None = None,
    packed_seq_params: Any = None,
    cp_size: int = 1,
) -> tuple[Tensor, None, Tensor] | None:
    """``run_fused_qk_topk`` with ``loss_coeff`` times the indexer's loss over the chosen tokens, or None.

    Megatron asks for the loss before the attention: what heads give the chosen tokens in all (lse) is computed for it here.

    Args:
        query: bf16 [queries, batch, attention heads, d]; key: bf16 [tokens, batch, 1, d].
        query_valid_rows: bool [batch, queries]; rows of padding teach nothing.
        calculate_per_token_loss: the sum over queries, not their mean.
    """
    if torch.distributed.is_initialized() and pg_collection.tp is not None and pg_collection.tp.size() > 1:
        return None
    if not _attention_served(query, key):
        return None
    chosen = run_fused_qk_topk(
        q, k, weights, index_topk, starts, ends, block_size, use_relu, use_local_indexer_varlen, cp_size=cp_size,
        packed_seq_params=packed_seq_params,
    )  # fmt: skip
    if chosen is None:
        return None
    rows = query_valid_rows if query_valid_rows is not None else q.new_ones(q.shape[1::-1], dtype=torch.bool)
    taught = torch.where(rows.view(q.shape[1], -1, 1), chosen[0], -1)
    losses = [
        _loss(q[:, i], k[:, i], weights[:, i], query[:, i], key[:, i], softmax_scale, taught[i]) for i in range(q.shape[1])
    ]
    total = torch.stack(losses).sum()
    return chosen[0], None, loss_coeff * (total if calculate_per_token_loss else total / rows.sum().clamp(min=1))


def run_fused_absorbed_sparse_attention(
    query: Tensor,
    key: Tensor,
    topk_indices: Tensor,
    softmax_scale: float,
    v_channels: int,
    topk_length: Tensor | None = None,
) -> Tensor | None:
    """Sparse MLA with gradients, bf16 [queries, batch, heads, v_channels], or None.

    Args:
        query: bf16 [queries, batch, heads, d]; key: bf16 [tokens, batch, 1, d].
        topk_indices: [batch, queries, topk], invalid ones anywhere.
        topk_length: [batch, queries]; only so many entries of a list count.
    """
    if not _attention_served(query, key, v_channels):
        return None
    lengths = [None] * query.shape[1] if topk_length is None else topk_length.int().contiguous()
    parts = []
    for i in range(query.shape[1]):
        lists = functions.as_int32(topk_indices[i].contiguous())[:, None]
        q, kv = query[:, i].contiguous(), key[:, i].contiguous()
        parts.append(sparse_attention(q, kv, lists, softmax_scale, lengths=lengths[i], d_v=v_channels)[0])
    return torch.stack(parts, 1)


@torch.no_grad()
def _choose(q: Tensor, k: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, topk: int) -> Tensor:
    return index_select(
        q.contiguous(), k.contiguous(), None, weights.float().contiguous(), starts, ends, topk, scores="bf16"
    )  # fmt: skip


def _loss(q: Tensor, k: Tensor, weights: Tensor, query: Tensor, key: Tensor, sm_scale: float, lists: Tensor) -> Tensor:
    """The sum of one sequence's losses."""
    query, key, lists = query.detach().contiguous(), key.detach().contiguous(), lists[:, None].contiguous()
    with torch.no_grad():
        lse = functions.sparse_attention(query, key, lists, sm_scale, d_v=min(query.shape[-1], channels.D_V))[1]
    return len(q) * indexer_loss(query, key, lse, q, k, weights, sm_scale, indices=lists)


def _indexer_served(q: Tensor, k: Tensor, weights: Tensor, topk: int, use_relu: bool) -> bool:
    shapes = q.dim() == 4 and k.dim() == 3 and weights.dim() == 3 and k.shape[1] == weights.shape[1] == q.shape[1]
    if not (use_relu and shapes and q.dtype is k.dtype is torch.bfloat16):
        return False
    return q.shape[2] <= channels.MOST_INDEX_HEADS and q.shape[3] in channels.INDEX_WIDTHS and 64 <= topk <= 4096


def _attention_served(query: Tensor, key: Tensor, d_v: int = 0) -> bool:
    """Whether kernels take these channels, d_v of them the value; as many as may be where only scores are wanted."""
    shapes = query.dim() == key.dim() == 4 and query.shape[1] == key.shape[1] and key.shape[2] == 1
    if not (shapes and query.dtype is key.dtype is torch.bfloat16):
        return False
    if query.shape[3] != key.shape[3] or query.shape[2] > 128:
        return False
    try:
        channels.check("query", query.shape[3], d_v or min(query.shape[3], channels.D_V))
    except InputError:
        return False
    return True
