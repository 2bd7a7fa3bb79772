"""Exact: the reference computes in the dtypes that it states, whatever ``torch.autocast`` around a model says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactly() -> Iterator[None]:
    """Without autocast, on the CPU and on CUDA devices: it would turn products of fp32 into ones of bf16."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
