"""Kernels of the backward of sparse MLA (Triton): scores, the queries' gradient, the tokens' gradient, one after the other.

One kernel for all five products would hold heads x channels of dq and tokens x channels of dkv at once, 147 KB each of a
block's 256 KB of registers. Instead the probabilities and the scores' gradients of a chunk of queries go through memory, in
BF16 as the products read them: 8 GB of 4096 queries, 128 heads and k 2048, beside 19 GB that are added to the tokens. What
that buys: all heads of a query share one gather and one sum per token, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...gpu import Gpu
from ...problem.channels import padded_to
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import AttentionBackwardSizes, AttentionBackwardSpec

_WEIGHT_BYTES = 1 << 29
"""Of probabilities and gradients of scores that are in memory at a time: 512 queries of 128 heads and 2048 tokens."""
_FLAT = 2048
_TILES = 128  # the widest step of the three kernels
_ROWS = 8
_FEW_HEADS = 32  # so few are the columns of a product, whose rows are channels; tensor cores of Hopper want 64 rows
_JOINED_HEADS, _JOINED_TOKENS = 64, 128
"""Columns and rows of the scores whose two products are one (3.0 → 2.7 ms); with 64 rows that brings nothing."""
_STEPS = ("score", "dq", "dkv")

# The best of each step at 4096 x 2048 on an H200, full lists, of 128 heads: 18.5 ms (scores 5.9, dq 3.0, dkv 9.5); of 64 10.5
# (2.7, 1.6, 6.0; with a block of channels a program of dkv and two operands of the scores 11.8). Atomics alone take 5.05.
_MANY = Config.of(
    "triton",
    **{"score_n": 128, "score_d": 32, "score_stages": 4, "score_warps": 8},
    **{"dq_n": 64, "dq_d": 128, "dq_stages": 2, "dq_warps": 4},
    **{"dkv_n": 64, "dkv_d": 64, "dkv_parts": 3, "dkv_stages": 3, "dkv_warps": 4},
)
_SMALL = Config.of(
    "triton",
    **{"score_n": 64, "score_d": 64, "score_stages": 2, "score_warps": 8},
    **{"dq_n": 32, "dq_d": 128, "dq_stages": 2, "dq_warps": 8},
    **{"dkv_n": 64, "dkv_d": 64, "dkv_parts": 1, "dkv_stages": 2, "dkv_warps": 4},
)


class AttentionBackwardKernels(Kernels[AttentionBackwardSpec, AttentionBackwardSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        of = {"score": "of the scores", "dq": "of the queries' gradient", "dkv": "of the tokens' gradient"}
        found = []
        for step in _STEPS:
            channels = (32, 64, 128) if step == "score" else (64, 128, 256)
            found += [
                Parameter(f"{step}_n", (32, 64, 128), f"tokens per step {of[step]}"),
                Parameter(f"{step}_d", channels, f"channels per {'step' if step == 'score' else 'sum'} {of[step]}"),
                Parameter(f"{step}_stages", (1, 2, 3, 4), f"stages of the loop {of[step]}"),
                Parameter(f"{step}_warps", (4, 8), f"warps per program {of[step]}"),
            ]
        return (*found, Parameter("dkv_parts", (1, 2, 3, 5, 9), "sums of the tokens' gradient per step of a program"))

    def constraints(self, spec: AttentionBackwardSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        padded = _padded(spec)
        sums = {"score": 2 * config["score_n"] * padded, "dq": _dq_channels(spec, config) * padded}
        sums["dkv"] = config["dkv_n"] * config["dkv_d"]
        # Where a product's operands wait in registers (mma.sync), 128 numbers of sums a thread spill 168 bytes.
        most = 128 if 90 <= gpu.capability < 120 else 96
        for step in _STEPS:
            yield from exceeds(f"{step} accumulator registers", sums[step] / (32 * config[f"{step}_warps"]), most)
        for step, need in _smem(spec, config).items():
            yield from exceeds(f"{step} smem", need, gpu.smem_per_block, " B")

    def guesses(self, spec: AttentionBackwardSpec, sizes: AttentionBackwardSizes, gpu: Gpu) -> Iterable[Config]:
        few = _MANY.replace(score_n=64, score_d=64, score_stages=2, score_warps=4)
        some = _MANY.replace(score_d=64, score_stages=3, dq_stages=3)
        first = few if spec.heads <= _FEW_HEADS else some if spec.heads <= 64 else _MANY
        fewer = _MANY.replace(score_stages=3, dq_warps=8, dkv_parts=1, dkv_stages=2)
        return (first, fewer, _SMALL, _SMALL.replace(score_d=32, dq_d=64))

    def derived(self, spec: AttentionBackwardSpec, config: Config) -> dict[str, Scalar]:
        return {
            "d_tail": spec.d_qk - spec.d_v,
            "padded_v": padded_to(spec.d_v),
            "padded_tail": padded_to(spec.d_qk - spec.d_v),
            "score_masked": spec.d_v % int(config["score_d"]) != 0,
            "padded": _padded(spec),
            "few_heads": _padded(spec) <= _FEW_HEADS,
            "score_tiles": -(-spec.topk // int(config["score_n"])),
            "joined": _padded(spec) == _JOINED_HEADS and config["score_n"] == _JOINED_TOKENS,
            "halves": _halves(spec, config),
            "dq_blocks": _blocks(spec, _dq_channels(spec, config)),
            "dq_masked": spec.d_qk % _dq_channels(spec, config) != 0,
            "dkv_blocks": _blocks(spec, config["dkv_d"] * config["dkv_parts"]),
            "dkv_masked": spec.d_qk % int(config["dkv_d"] * config["dkv_parts"]) != 0,
            "flat": _FLAT,
            "tiles": _TILES,
            "rows": _ROWS,
        }

    def launches(
        self, spec: AttentionBackwardSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        if not inputs["q"].numel() or not inputs["kv"].numel():
            for output in outputs.values():
                output.zero_()
            return ()
        return tuple(_launches(spec, config, inputs, outputs))


def _launches(spec: AttentionBackwardSpec, config: Config, inputs: Inputs, outputs: Outputs) -> Iterator[Launch]:
    q, kv, do, lse = (inputs[name] for name in ("q", "kv", "do", "lse"))
    queries, tokens = len(q), len(kv)
    total, delta, sums = (_empty(kv, torch.float32, *shape) for shape in (lse.shape, lse.shape, kv.shape))
    extra = [inputs["dlse"]] if spec.lse_gradient else []
    extra += [inputs["sink"], _empty(kv, torch.float32, *lse.shape)] if spec.sink else []
    reach = _empty(q, torch.int32, queries)
    lists = [inputs["indices"], *([inputs["lengths"]] if spec.lengths else [])]
    yield Launch("prepare", (queries, 1, 1), (inputs["out"], do, lse, *extra, *lists, total, delta, reach, tokens))
    lists.append(reach)
    if spec.sink:
        yield Launch("sink_gradient", (-(-spec.heads // 16), 1, 1), (extra[-1], outputs["dsink"], queries))
    flat = (-(-sums.numel() // _FLAT), 1, 1)
    yield Launch("clear", flat, (sums, sums.numel()))

    chunk, padded = _chunk(spec, inputs), _padded(spec)
    weight, slope = (_empty(q, torch.bfloat16, chunk, spec.topk, padded) for _ in range(2))
    rows = _empty(q, torch.float32, chunk, spec.topk, spec.d_qk) if spec.deterministic else sums
    for first in range(0, queries, chunk):
        n = min(chunk, queries - first)
        of_scores = (q, kv, *lists, do, total, delta, weight, slope, first, tokens, inputs["sm_scale"])
        yield Launch("scores", (n * -(-spec.topk // int(config["score_n"])), 1, 1), of_scores)
        of_queries = (kv, *lists, slope, outputs["dq"], first, tokens)
        yield Launch("query_gradient", (n * _blocks(spec, _dq_channels(spec, config)), 1, 1), of_queries)
        grid = (n * _blocks(spec, config["dkv_d"] * config["dkv_parts"]), 1, 1)
        if spec.deterministic:
            yield Launch("token_gradient", grid, (q, do, *lists[1:], weight, slope, rows, first))
            number = first // chunk
            places = (number * chunk * spec.topk, number * (tokens + 1))
            yield Launch("gather", (tokens, 1, 1), (rows, inputs["order"], inputs["offsets"], sums, *places))
        else:
            yield Launch("token_gradient", grid, (q, do, *lists, weight, slope, sums, first, tokens))
    yield Launch("settle", flat, (sums, outputs["dkv"], sums.numel()))


def _empty(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=like.device)


def _chunk(spec: AttentionBackwardSpec, inputs: Inputs) -> int:
    """Queries whose probabilities are in memory at a time: with lists, as many as these are made for."""
    if spec.deterministic:
        return int(inputs["order"].shape[1]) // spec.topk
    return max(1, min(len(inputs["q"]), _WEIGHT_BYTES // (4 * spec.topk * _padded(spec))))


def _padded(spec: AttentionBackwardSpec) -> int:
    """Heads, padded to what a matrix product takes."""
    return max(16, next_power_of_two(spec.heads))


def _halves(spec: AttentionBackwardSpec, config: Config) -> bool:
    """Whether a program of dq has a block of channels and half a one, by which no program of 576 channels is part empty."""
    return _padded(spec) == _JOINED_HEADS and spec.d_qk % (int(config["dq_d"]) * 3 // 2) == 0


def _dq_channels(spec: AttentionBackwardSpec, config: Config) -> int:
    return int(config["dq_d"]) * 3 // 2 if _halves(spec, config) else int(config["dq_d"])


def _blocks(spec: AttentionBackwardSpec, channels: int) -> int:
    return -(-spec.d_qk // int(channels))


def _smem(spec: AttentionBackwardSpec, config: Config) -> dict[str, int]:
    """Bytes of shared memory of each step: the tiles of its loop in flight, and what it rounds or adds through."""
    padded = _padded(spec)
    score = 2 * config["score_d"] * (config["score_n"] + 2 * padded) * config["score_stages"]
    dq = 2 * config["dq_n"] * (_dq_channels(spec, config) + padded) * config["dq_stages"]
    own = 4 * padded * config["dkv_d"] * config["dkv_parts"]  # of q and do
    dkv = own + 4 * config["dkv_n"] * padded * config["dkv_stages"] + 4 * config["dkv_n"] * config["dkv_d"]
    return {"score": int(score), "dq": int(dq), "dkv": int(dkv) + 1024}
