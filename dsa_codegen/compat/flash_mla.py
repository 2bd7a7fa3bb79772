"""FlashMLA's sparse attention: its names, arguments and conventions (also those of sgl-flash-mla 1.0 and of vLLM's fork).

Nothing is scheduled ahead: metadata is taken for the sake of the call and never looked at, so one object serves any shapes
and lengths. A query without a token has lse +inf here, as FlashMLA defines it. Prefill is batch invariant where the process
is (``use_batch_invariant``, DSA_BATCH_INVARIANT=1), decode also where a call asks for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..functions import sparse_attention, sparse_attention_paged
from ..problem import checks

_LOG2E = math.log2(math.e)
_D_V = 512
_FORMATS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "V32": (576, 656, {}),
    "V4": (512, 584, {}),
    "V41": (512, 528, {"layout": "v41"}),
    "V32_NO_ROPE": (512, 528, {"layout": "fp8_fp32_128", "d_rope": 0}),
}
"""By ``kv_format``: the channels of q, the bytes of a token, and how ``sparse_attention_paged`` calls such a cache. Where no
format is named, the first of that size is meant."""


@dataclass
class FlashMLASchedMeta:
    """What FlashMLA keeps its schedule in; its fields may be assigned and mean nothing here."""

    have_initialized: bool = False
    config: Any = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """An empty FlashMLASchedMeta, and None, whatever the arguments."""
    return FlashMLASchedMeta(), None


def get_mla_decoding_metadata(
    seqlens_k: Tensor,
    num_q_tokens_per_head_k: int,
    h_k: int,
    h_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    use_legacy: bool = False,
) -> tuple[Tensor, Tensor]:
    """The schedule as tensors, for engines that copy it into the memory of a CUDA graph: zeros that nobody reads.

    Returns:
        int32 [1, 8] and int32 [batch + 1].
    """
    return seqlens_k.new_zeros(1, 8, dtype=torch.int32), seqlens_k.new_zeros(len(seqlens_k) + 1, dtype=torch.int32)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = _D_V,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    use_legacy: bool = False,
    return_log2_lse: bool | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sparse prefill.

    Args:
        q: bf16 [s_q, h_q, d_qk]; any h_q from 1 to 128, d_qk 576 or 512.
        kv: bf16 [s_kv, 1, d_qk].
        indices: int32 or int64 [s_q, 1, topk]; -1 or >= s_kv for "no token"; any topk.
        d_v: 512.
        attn_sink: fp32 [h_q].
        topk_length: int32 [s_q].
        use_legacy: taken, no matter which.
        return_log2_lse: None for natural logarithms, True for base 2, False for neither statistic.
        out: bf16 [s_q, h_q, 512], where to write the output. Where it is strided the result is copied into it.

    Returns:
        (out, max_logits fp32 [s_q, h_q], lse fp32 [s_q, h_q]). A query without a token: 0, -inf, +inf.
    """
    checks.one_of("d_v", d_v, (_D_V,))
    wanted = return_log2_lse is not False
    max_logits = q.new_empty(q.shape[:2], dtype=torch.float32) if wanted else None
    given, into = (q, kv, indices, sm_scale), _contiguous(out)
    result, lse = sparse_attention(*given, lengths=topk_length, sink=attn_sink, out=into, max_logits=max_logits)
    if max_logits is None:
        return _delivered(result, out), None, None
    if return_log2_lse:
        max_logits.mul_(_LOG2E)
        lse.mul_(_LOG2E)
    return _delivered(result, out), max_logits, _lonely(lse)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    enable_batch_invariant: bool = False,
    use_legacy: bool = False,
    kv_format: str | None = None,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse decode over a paged FP8 cache; dense decode (``indices`` None) is refused.

    Args:
        q: bf16 [b, s_q, h_q, d]; any h_q from 1 to 128, any s_q, d 576 or 512.
        k_cache: one byte per element (e4m3, int8, uint8), [blocks, page, 1, 656] (d 576), or 584 or 528 bytes a token (d 512).
        block_table, cache_seqlens, tile_scheduler_metadata, num_splits, use_legacy: taken and never read.
        head_dim_v: 512.
        softmax_scale: d^-0.5 where None.
        causal: False. is_fp8_kvcache: True, or None. descale_q, descale_k: None.
        indices: int32 or int64 [b, s_q, topk], physical slots.
        attn_sink: fp32 [h_q].
        extra_k_cache, extra_indices_in_kvcache: a second pool with its own page and topk, under the same softmax.
        topk_length, extra_topk_length: int32 [b].
        enable_batch_invariant: as ``batch_invariant`` of ``sparse_attention_paged``.
        kv_format: "V32" (d 576; 656 bytes), "V4" (584), "V41" (528) or "V32_NO_ROPE" (528); None for what the bytes say, of 528
            "V41". The second pool has the same.
        out: bf16 [b, s_q, h_q, 512], where to write the output. Where it is strided the result is copied into it.

    Returns:
        out bf16 [b, s_q, h_q, 512] and lse fp32 [b, h_q, s_q] (a transposed view). A query without a token: 0, +inf.
    """
    if indices is None:
        raise InputError("indices", "None", "a tensor: FlashMLA's dense mode is not served")
    single: dict[str, tuple[object, tuple[object, ...]]] = {
        "head_dim_v": (head_dim_v, (_D_V,)),
        "causal": (causal, (False,)),
        "is_fp8_kvcache": (is_fp8_kvcache, (True, None)),
        "enable_batch_invariant": (enable_batch_invariant, (False, True)),
        "kv_format": (kv_format, (None, *_possible(q, k_cache))),
    }
    for name, (value, allowed) in single.items():
        checks.one_of(name, value, allowed)
    for name, descale in (("descale_q", descale_q), ("descale_k", descale_k)):
        if descale is not None:
            raise InputError(name, "a tensor", "None: it belongs to FlashMLA's dense FP8 mode")
    result, lse = sparse_attention_paged(
        q,
        k_cache.view(torch.uint8),
        indices,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        lengths=topk_length,
        sink=attn_sink,
        extra_cache=None if extra_k_cache is None else extra_k_cache.view(torch.uint8),
        extra_indices=extra_indices_in_kvcache,
        extra_lengths=extra_topk_length,
        out=_contiguous(out),
        batch_invariant=enable_batch_invariant,
        **_stored(kv_format, q, k_cache),
    )
    return _delivered(result, out), _lonely(lse).transpose(1, 2)


def _possible(q: Tensor, k_cache: Tensor) -> list[str]:
    """The formats of so many channels and bytes a token."""
    return [name for name, (channels, width, _) in _FORMATS.items() if (channels, width) == (q.shape[-1], k_cache.shape[-1])]


def _stored(kv_format: str | None, q: Tensor, k_cache: Tensor) -> dict[str, Any]:
    """How our function calls the cache; of a size that no format has, nothing: it refuses the cache by name."""
    name = kv_format or next(iter(_possible(q, k_cache)), None)
    return _FORMATS[name][2] if name else {}


def _contiguous(out: Tensor | None) -> Tensor | None:
    """The buffer, where kernels can write to it."""
    return out if out is None or out.is_contiguous() else None


def _delivered(result: Tensor, out: Tensor | None) -> Tensor:
    """The caller's buffer with the result in it; the result where there is no buffer."""
    return result if out is None or out is result else out.copy_(result)


def _lonely(lse: Tensor) -> Tensor:
    """-inf, a softmax over nothing, as FlashMLA writes it; in one launch."""
    return lse.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=math.inf)
