"""What the indexers of transformers' models differ in: where rotary channels lie, how they pair, what queries are made of.

The projections are the modules' own, in the dtypes and in the order of their ``forward``, so that queries, keys and weights are
theirs bit for bit. Classes that are not named here would be served wrongly, and are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HALVES, _PAIRS = "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"


@dataclass(frozen=True)
class Family:
    """One scheme of an indexer."""

    rotary: str
    """The function of the model's module that rotates: channel i with i + d/2, or neighbours."""
    rotary_last: bool = False
    """Whether the rotary channels come behind the others."""
    of_hidden: bool = False
    """Whether queries are made of the hidden states, with a norm and a scale by position of their own."""


FAMILIES = {
    "DeepseekV32Attention": Family(_HALVES),
    "GlmMoeDsaAttention": Family(_PAIRS),
    "HYV4Attention": Family(_HALVES, rotary_last=True),
    "AXK2Attention": Family(_HALVES),
    "MistralLarge4TextAttention": Family(_PAIRS, of_hidden=True),
    "Dots3NoteTextAttention": Family(_PAIRS),
}
"""Attention classes of transformers 5.17 to 5.24 whose scheme is DeepSeek Sparse Attention."""


def family_of(attention: nn.Module) -> Family | None:
    """The family of an attention module, by its class or one that it is derived from."""
    return next((FAMILIES[each.__name__] for each in type(attention).__mro__ if each.__name__ in FAMILIES), None)


def keys(family: Family, indexer: Any, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Keys [batch, tokens, head_dim] of new tokens, as the cache stores them."""
    made = indexer.wk(hidden_states).to(indexer.k_norm.weight.dtype)
    made = indexer.k_norm(made).to(hidden_states.dtype).unsqueeze(2)
    return _rotated(family, indexer, made, rotation).squeeze(2)


def queries(
    family: Family,
    indexer: Any,
    hidden_states: Tensor,
    q_resid: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
) -> Tensor:
    """Queries [batch, queries, heads, head_dim]."""
    batch, length, _ = hidden_states.shape
    made = indexer.wq_b(indexer.q_input_norm(hidden_states) if family.of_hidden else q_resid)
    made = made.view(batch, length, indexer.n_heads, indexer.head_dim)
    if family.of_hidden:
        made = indexer.softmax_scaling(made, position_ids, head_dim_first=False)
    return _rotated(family, indexer, made, rotation)


def weights(indexer: Any, hidden_states: Tensor) -> Tensor:
    """fp32 [batch, queries, heads], with heads^-0.5 and head_dim^-0.5 folded in."""
    made = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
    return made * (indexer.n_heads**-0.5) * indexer.softmax_scale


def _rotated(family: Family, indexer: Any, heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on the channels [batch, tokens, heads, head_dim] that have them; none on layers without."""
    if not getattr(indexer, "use_rope", True):
        return heads
    rotary, plain = indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim
    pieces = torch.split(heads, [plain, rotary] if family.rotary_last else [rotary, plain], dim=-1)
    rotate: Callable[..., tuple[Tensor, Tensor]] = getattr(sys.modules[type(indexer).__module__], family.rotary)
    turned, _ = rotate(pieces[family.rotary_last], pieces[family.rotary_last][:, :, :1], *rotation, unsqueeze_dim=2)
    return torch.cat([pieces[0], turned] if family.rotary_last else [turned, pieces[1]], dim=-1)
