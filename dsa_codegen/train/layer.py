"""A layer in training: the module that serves, run with gradients over packed sequences instead of caches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functions
from ..choice import index_select
from ..distributed import DataParallel
from ..distributed.modes import Alone
from ..errors import InputError
from ..nn import plain
from ..nn.attention import SparseAttention
from ..problem import checks
from ..problem.presets import PRECISIONS
from .dense import dense_attention
from .indexer import indexer_loss
from .sparse import sparse_attention

STAGES = ("dense", "warm-up", "sparse")
"""All tokens, the indexer left alone; all tokens, which it learns from; the chosen tokens, which it learns from."""


class Trained(NamedTuple):
    """What a layer gives in training."""

    out: Tensor
    """[tokens, hidden], what is added to the residual stream."""
    indexer_loss: Tensor | None
    """Without dimensions, with gradients of the indexer's parameters alone; None where it does not learn."""
    chosen: Tensor | None
    """int32 [tokens, topk], -1 where there are fewer; None where nothing was chosen."""


class Windows(NamedTuple):
    """Where the tokens of packed sequences stand and what they see."""

    cos_sin: Tensor
    """fp32 [positions, d_rope], see ``nn.rotary_table``."""
    positions: Tensor
    """int64 [tokens], each within its own sequence."""
    starts: Tensor
    """int32 [tokens]: windows [start, end) in the rows of ``hidden``, its own row included."""
    ends: Tensor


def run_layer(
    layer: SparseAttention,
    hidden: Tensor,
    windows: Windows,
    *,
    stage: str = "sparse",
    scores: str = "bf16",
    deterministic: bool | None = None,
) -> Trained:
    """The layer's forward with gradients, in one of the stages of training (DeepSeek-V3.2 report, section 2).

    The indexer reads ``hidden`` and the queries' low rank as constants: it learns from its own loss alone, and everything else
    from what becomes of ``out``. In the warm-up only the former is trained.

    Args:
        layer: ``nn.SparseAttention`` on one rank, or under ``DataParallel``, where every rank has sequences of its own, and
            gradients are averaged as torch's DDP does; results are the rank's own.
        hidden: [tokens, hidden], normalised, the sequences one behind the other.
        windows: of these tokens.
        stage: "dense", "warm-up" or "sparse".
        scores: "bf16" or "fp8", as the indexer will score when it serves.
        deterministic: as in ``sparse_attention``.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    checks.one_of("stage", stage, STAGES)
    checks.one_of("scores", scores, PRECISIONS)
    if type(layer.parallel) is not Alone and not isinstance(layer.parallel, DataParallel):
        alone = "a layer on one rank, or under DataParallel, whose gradients you average: no other mode has a backward"
        raise InputError("layer", f"one under {type(layer.parallel).__name__}", alone)
    place: Any = windows  # of a step they have what is read here
    q_low = layer.q_a_layernorm(layer.q_a_proj(hidden))
    latent = plain.latent_rows(layer.kv_a_proj_with_mqa(hidden), layer.kv_a_layernorm, layer.shape.rotary, place)
    weight = layer.kv_b_proj.weight.view(layer.heads, -1, layer.model.d_nope)
    up_key, up_value = weight.split([layer.shape.d_head, layer.shape.d_v], 1)
    dtype = torch.bfloat16 if hidden.is_cuda else latent.dtype
    q, kv = layer._queries(q_low, up_key, place).to(dtype), latent[:, None].to(dtype)
    out, loss, chosen = _attended(layer, q, kv, (hidden, q_low), windows, (stage, scores, deterministic))
    values = torch.bmm(out.transpose(0, 1).to(hidden.dtype), up_value.transpose(1, 2))
    return Trained(layer.o_proj(values.transpose(0, 1).flatten(1)), loss, chosen)


def _attended(
    layer: SparseAttention,
    q: Tensor,
    kv: Tensor,
    read: tuple[Tensor, Tensor],
    windows: Windows,
    how: tuple[str, str, bool | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """([tokens, heads, 512], the indexer's loss, the choice)."""
    (stage, scores, deterministic), sink = how, None if layer.sinks is None else layer.sinks.float()
    if stage == "dense":
        return dense_attention(q, kv, layer.sm_scale, windows.starts, windows.ends, sink=sink)[0], None, None
    indexer = _indexed(layer, *read, windows, q.dtype)
    given: dict[str, Any] = {"sink": sink, "score": layer.model.score, "scores": scores, "deterministic": deterministic}
    if stage == "warm-up":
        given |= {"starts": windows.starts, "ends": windows.ends}
        out, lse = dense_attention(q, kv, layer.sm_scale, windows.starts, windows.ends, sink=sink)
        return out, indexer_loss(q, kv, lse, *indexer, sm_scale=layer.sm_scale, **given), None
    chosen = _chosen(layer, *indexer, windows, scores)
    lists = chosen[:, None]
    out, lse = sparse_attention(q, kv, lists, layer.sm_scale, sink=sink, deterministic=deterministic)
    return out, indexer_loss(q, kv, lse, *indexer, sm_scale=layer.sm_scale, indices=lists, **given), chosen


def _indexed(
    layer: SparseAttention, hidden: Tensor, q_low: Tensor, windows: Windows, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The indexer's queries, keys and folded weights."""
    place: Any = windows
    hidden, q_low, indexer, model = hidden.detach(), q_low.detach(), layer.indexer, layer.model
    q = indexer.wq_b(q_low).view(-1, model.index_heads, model.index_head_dim)
    q, k = plain.index_rows(q, indexer.wk(hidden), indexer.k_norm, layer.shape.index_rotary, place)
    return q.to(dtype), k.to(dtype), plain.folded(indexer.weights_proj(hidden), model.index_heads, model.index_head_dim)


@torch.no_grad()
def _chosen(layer: SparseAttention, q: Tensor, k: Tensor, weights: Tensor, windows: Windows, scores: str) -> Tensor:
    """The choice, by the kernels that serve."""
    k_scale: Tensor | None = None
    if scores == "fp8":
        unfolded = weights * (q.shape[1] * q.shape[2]) ** 0.5
        q, weights = functions.quantize_index_q(q.bfloat16().contiguous(), unfolded.contiguous())
        k, k_scale = functions.quantize_index_k(k.bfloat16().contiguous())
    given = q.contiguous(), k.contiguous(), k_scale, weights.contiguous(), windows.starts, windows.ends
    return index_select(*given, layer.model.topk, score=layer.model.score, scores=scores)
