"""Sweep: time and memory of dense attention, of a sliding window and of sparse attention, from 4K to one million tokens.

The last 1024 queries of a context, DeepSeek-V3.2 on one GPU (128 heads). Dense attention expands keys and values of 16 heads
at a time; the sliding window is the sparse attention over the last 2048 tokens; sparse attention is the whole layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..problem.draw import Draw
from ..problem.op import Inputs
from ..proof.measure import measure_calls
from ..proof.stopwatch import Stopwatch
from ..proof.timing import Policy
from .cases import BenchCase, case
from .chains import layer_of
from .peers import dense
from .problems import stage_of
from .stage import Run

CONTEXTS = tuple(1 << n for n in range(12, 21))
QUERIES, HEADS, HEAD_DIM, TOPK = 1024, 128, 576, 2048
METHODS = ("dense", "window", "sparse")
_POLICY = Policy(cold_l2=False, reps=2, rounds=3, warmup_ms=1.0)


def sweep(
    contexts: Sequence[int] = CONTEXTS,
    device: str = "cuda",
    queries: int = QUERIES,
    heads: int = HEADS,
    stopwatch: Stopwatch | None = None,
) -> list[dict[str, Any]]:
    """One row per context and method: ``{"context", "method", "us", "bytes", "note"}``; bytes is the peak beside the model."""
    cases = [case_of(context, queries, heads) for context in contexts]
    return [_measured(each, method, device, stopwatch) for each in cases for method in METHODS]


def case_of(context: int, queries: int = QUERIES, heads: int = HEADS) -> BenchCase:
    """The layer whose attention is compared at a context."""
    shape = {"queries": min(queries, context), "context": context, "heads": heads, "head_dim": HEAD_DIM, "k": TOPK}
    return case("layer_prefill", "real", shape)


def _measured(each: BenchCase, method: str, device: str, stopwatch: Stopwatch | None) -> dict[str, Any]:
    row = {"context": each["context"], "method": method, "us": None, "bytes": None, "note": ""}
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run = _MAKERS[method](each, Draw(0, device))
        if on_gpu:  # what was drawn only to make the inputs does not count
            torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        (measured,) = measure_calls([[run]], _POLICY, stopwatch)
    except torch.OutOfMemoryError:
        return {**row, "note": "out of memory"}
    return {**row, "us": round(measured.timing.median, 2), "bytes": peak}


def _dense(each: BenchCase, draw: Draw) -> Run:
    def expanded(tokens: int, channels: int) -> Tensor:
        made = torch.empty(1, dense.GROUP, tokens, channels, dtype=torch.bfloat16, device=draw.device)
        for head in made[0]:
            head.copy_(draw.normal(tokens, channels))
        return made

    q = expanded(each["queries"], dense.D_QK)
    k, v = expanded(each["context"], dense.D_QK), expanded(each["context"], dense.D_V)
    latent = draw.normal(each["context"], each["head_dim"], dtype=torch.bfloat16)  # from which the groups are expanded
    attend = dense.attention_of(q, k, v, each["heads"] // dense.GROUP)

    def run(kept: Tensor = latent) -> None:
        attend()

    return run


def _window(each: BenchCase, draw: Draw) -> Run:
    inputs = _attention_inputs(each, draw)
    last = inputs["ends"][:, None] - 1 - torch.arange(each["k"], device=draw.device)
    indices = last.clamp(min=-1).int()[:, None].contiguous()
    q, kv, sm_scale = inputs["q"], inputs["kv"], inputs["sm_scale"]
    return _nothing_returned(lambda: functions.sparse_attention(q, kv, indices, sm_scale))


def _sparse(each: BenchCase, draw: Draw) -> Run:
    layer, inputs = layer_of(each), _attention_inputs(each, draw)
    names = "q kv index_q index_weights k k_scale starts ends"
    args = [inputs[name] for name in names.split()]
    return _nothing_returned(lambda: layer.prefill(*args))


def _attention_inputs(each: BenchCase, draw: Draw) -> Inputs:
    return stage_of("layer_prefill").inputs(each, draw)


def _nothing_returned(run: Callable[[], object]) -> Run:
    def call() -> None:
        run()

    return call


_MAKERS: dict[str, Callable[[BenchCase, Draw], Run]] = {"dense": _dense, "window": _window, "sparse": _sparse}


def crossover(rows: Sequence[Mapping[str, Any]], slow: str = "dense", fast: str = "sparse") -> float | None:
    """The context from which on ``fast`` is faster, interpolated on a logarithmic scale; None where there is none."""
    pairs = list(_pairs(rows, slow, fast))
    for (context, ratio), (next_context, next_ratio) in itertools.pairwise(pairs):
        if ratio < 1 <= next_ratio:
            share = (1 - ratio) / (next_ratio - ratio)
            return float(context * (next_context / context) ** share)
    return float(pairs[0][0]) if pairs and pairs[0][1] >= 1 else None


def _pairs(rows: Sequence[Mapping[str, Any]], slow: str, fast: str) -> Iterator[tuple[int, float]]:
    times = {(row["context"], row["method"]): row["us"] for row in rows if row["us"]}
    for context in sorted({row["context"] for row in rows}):
        if (context, slow) in times and (context, fast) in times:
            yield context, times[context, slow] / times[context, fast]
