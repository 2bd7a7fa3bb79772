"""Logits of the indexers: dtypes, what references compute in, rows padded to cache lines, how many rows a budget holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import checks

LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ROW_ALIGNMENT = 128  # elements of a row of logits


def empty_logits(rows: int, columns: int, dtype: str, device: torch.device) -> Tensor:
    """Uninitialised logits [rows, columns] whose rows start on cache lines, so that neighbouring tiles never share one."""
    return torch.empty(rows, _stride(columns), dtype=LOGITS[dtype], device=device)[:, :columns]


def exact(value: Tensor) -> Tensor:
    """The operand as the references multiply it: fp32, and fp64 where it came so."""
    return value if value.dtype is torch.float64 else value.float()


def row_bytes(columns: int, dtype: str) -> int:
    """Bytes of a row of logits in memory."""
    return _stride(columns) * LOGITS[dtype].itemsize


def chunk_rows(budget: int, queries: int, columns: int, dtype: str) -> int:
    """How many rows of logits to compute at a time, so that they take no more bytes than ``budget``.

    All of them, or else a multiple of 4, since the kernels take windows that are 16-byte aligned; 0 where 4 are too many.
    """
    fitting = max(budget, 0) // max(row_bytes(columns, dtype), 1)
    return queries if fitting >= queries else fitting // 4 * 4


def whole_weights(heads: int) -> bool:
    """Whether rows of so many fp32 weights are whole pieces of 16 bytes, which kernels then count instead of elements."""
    return heads % 4 == 0


def weight_stride(weights: Tensor) -> int:
    """From one row of weights to the next: in pieces of 16 bytes where rows are whole ones, else in elements."""
    return checks.pieces(weights, 0) if whole_weights(weights.shape[1]) else checks.step(weights, 0)


def _stride(columns: int) -> int:
    return -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
