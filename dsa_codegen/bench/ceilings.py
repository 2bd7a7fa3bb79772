"""Ceilings: what this very GPU reaches today with a copy and with the largest matrix products; measured once per run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..gpu import Gpu
from ..problem.checks import FP8
from ..proof.measure import measure_calls
from ..proof.stopwatch import Stopwatch
from ..proof.timing import Policy
from .problems import Roofs

_POLICY = Policy(cold_l2=False, reps=4, rounds=5)
_SIZE = 8192  # rows, columns and depth of the products
_COPY = 1 << 30  # bytes


def measure_ceilings(
    device: str = "cuda", size: int = _SIZE, copied: int = _COPY, stopwatch: Stopwatch | None = None
) -> dict[str, float]:
    """TB/s of a copy (read and written), and TFLOP/s of cuBLAS products in BF16 and, where the GPU has it, FP8."""
    source = torch.randn(copied // 4, device=device)  # not zeros: bits that never change cost less power
    target = torch.empty_like(source)
    # A kernel that reads and writes every byte, 16 per thread and step: in a graph `copy_` becomes a memcpy node, which
    # reaches 2.8 of 4.3 TB/s.
    rates = {"copy_tb_s": 2 * copied / _time_us(lambda: torch.neg(source, out=target), stopwatch) / 1e6}
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    flops = 2.0 * size**3
    rates["bf16_tflops"] = flops / _time_us(lambda: a @ b.T, stopwatch) / 1e6
    one = torch.ones((), device=device)
    a8, b8 = a.to(FP8), b.to(FP8)
    try:
        product = lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        rates["fp8_tflops"] = flops / _time_us(product, stopwatch) / 1e6
    except RuntimeError:  # GPUs before Ada have no FP8 products
        pass
    return rates


def roofs(measured: Mapping[str, Any], gpu: Gpu) -> Roofs:
    """The measured rates; the datasheet's where one is missing."""
    sheet = Roofs.of_datasheet(gpu)
    tflops = {unit: float(measured.get(f"{unit}_tflops", rate)) for unit, rate in sheet.tflops.items()}
    return Roofs(tflops, float(measured.get("copy_tb_s", sheet.bandwidth)))


def _time_us(call: Callable[[], object], stopwatch: Stopwatch | None) -> float:
    def run() -> None:
        call()

    (measured,) = measure_calls([[run]], _POLICY, stopwatch)
    return measured.timing.median
