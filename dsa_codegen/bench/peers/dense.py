"""Dense attention, the O(L²) line: multi-head latent attention with keys and values expanded per head, by torch's SDPA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stage import Run

D_QK, D_V = 192, 128
"""Channels of a head's expanded key and value in DeepSeek-V3.2."""
GROUP = 16
"""Heads whose keys and values exist at a time: 10.7 GB at one million tokens."""


def attention_of(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Run:
    """Attention of the last queries to the whole context, ``groups`` times as so many groups of heads would run.

    The causal triangle of the last queries is computed too, and thrown away: cuDNN, the fastest here, knows no mask that
    ends at the lower right. With 1024 queries that is 12 % of the work at 4K tokens and 0.05 % at one million.

    Args:
        q, k, v: bf16 [1, heads, queries or tokens, channels].
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fastest_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def run() -> None:
        with sdpa_kernel(fastest_first, set_priority=True):
            for _ in range(groups):
                torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return run
