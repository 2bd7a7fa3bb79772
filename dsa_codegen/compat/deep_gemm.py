"""DeepGEMM's indexer logits: its names, arguments and conventions, FP8 only (also as vLLM's copy of version 2.8 spells them).

Nothing is scheduled ahead: metadata is made for the sake of the call and never looked at. Rows of logits are padded to 128
elements where DeepGEMM pads them to 1024 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..functions import indexer_logits, indexer_logits_paged

_LOGITS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_Pair = tuple[Tensor, Tensor | None]


def get_num_sms() -> int:
    """SMs of the current CUDA device; 1 without one."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def get_paged_mqa_logits_metadata(context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None) -> Tensor:
    """int32 [num_sms + 1, 2] of zeros, which nobody reads: engines copy them into the memory of a CUDA graph."""
    return context_lens.new_zeros(num_sms + 1, 2)


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool | int | None = None,
    max_seqlen_k: int = 0,
) -> Tensor:
    """Prefill logits, fp32: ``fp8_fp4_mqa_logits`` without a scale of q."""
    return fp8_fp4_mqa_logits((q, None), kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k)


def fp8_fp4_mqa_logits(
    q: _Pair,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool | int | None = None,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
    schedule_meta: Tensor | None = None,
) -> Tensor:
    """Prefill logits.

    Args:
        q: e4m3 [seq_len, heads, head_dim], and None (a scale of q is FP4's); heads 8, 16, 32 or 64.
        kv: e4m3 [seq_len_kv, head_dim] and fp32 [seq_len_kv].
        weights: fp32 [seq_len, heads].
        cu_seq_len_k_start, cu_seq_len_k_end: int32 [seq_len], each query's window.
        clean_logits: write -inf outside of the windows. By default so where rows are whole, and not where they are compressed.
            A number in its place is version 2.8's ``max_seqlen_k``.
        max_seqlen_k: where it is not 0, rows are compressed: column 0 is the first token of the row's window.
        schedule_meta: never read.

    Returns:
        [seq_len, seq_len_kv] or [seq_len, max_seqlen_k].
    """
    if isinstance(clean_logits, bool):
        clean = clean_logits
    else:
        max_seqlen_k = clean_logits or max_seqlen_k
        clean = not max_seqlen_k
    if clean and max_seqlen_k:
        raise InputError("clean_logits", "True", "False with max_seqlen_k")
    windows = cu_seq_len_k_start, cu_seq_len_k_end
    return indexer_logits(
        _fp8(q), *kv, weights, *windows, logits=_dtype(logits_dtype), clean=clean, max_window=max_seqlen_k or None
    )


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:
    """Decode logits, fp32: ``fp8_fp4_paged_mqa_logits`` without a scale of q."""
    cached = kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len
    return fp8_fp4_paged_mqa_logits((q, None), *cached, clean_logits, indices=indices)


def fp8_fp4_paged_mqa_logits(
    q: _Pair,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Tensor:
    """Decode logits.

    Args:
        q: e4m3 [batch, next_n, heads, head_dim], and None (a scale of q is FP4's); next_n 1 to 8.
        kv_cache: uint8 [blocks, page, 1, head_dim + 4]; page 16 to 256.
        weights: fp32 [batch · next_n, heads].
        context_lens: int32 [batch, next_n], or [batch] where next_n is 1.
        block_table: int32 [batch, max_blocks].
        schedule_meta: never read.
        max_context_len: columns of the result.
        clean_logits: write -inf at and beyond each length; served with lengths in two dimensions too.
        indices: int32 [batch], rows with the same number are tokens of one sequence. Each has its own row of the block table
            and its own length, so the logits are the same without them.

    Returns:
        [batch · next_n, max_context_len].
    """
    values = _fp8(q)
    lengths = context_lens[:, None] if context_lens.dim() == 1 else context_lens
    logits = _dtype(logits_dtype)
    return indexer_logits_paged(
        values, kv_cache, weights, lengths, block_table, max_context_len, logits=logits, clean=clean_logits
    )


def _fp8(q: _Pair) -> Tensor:
    values, scale = q
    if scale is not None:
        raise InputError("q", "a pair with scales", "(q, None): FP4 is not served, and FP8 scales are folded into the weights")
    return values


def _dtype(logits_dtype: torch.dtype) -> str:
    if logits_dtype not in _LOGITS:
        raise InputError("logits_dtype", str(logits_dtype), " or ".join(map(str, _LOGITS)))
    return _LOGITS[logits_dtype]
