"""Kernels of the indexer's loss (Triton): scores of both, their rows normalised, then the gradients of the scores spread out.

Rows of a bounded number of queries are in memory: of a warm-up of 32K tokens 1024 at a time, whatever the batch. The keys'
gradient of whole windows is summed by programs that own tokens and go through the queries; that of chosen tokens by queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...gpu import Gpu
from ...problem.channels import padded_to
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import IndexerBackwardSizes, IndexerBackwardSpec

_BYTES = 1 << 28
"""Of the rows of targets and scores that are in memory at a time."""
_FLAT = 2048
_ROWS = 8
_ROW = 1024
_SPLITS = 8  # 64 tiles of 128 tokens fill half of an H100

# 4096 queries of 8K, 128 heads and 64 of the indexer, on an H200: 11.8 ms over whole windows (scores 8.1, the indexer's queries
# 1.7, its keys 1.8), 5.7 over 2048 chosen tokens. The queries' gradients took 4.2 on 8 warps, and on 4 spilled 168 bytes; since
# they sum up the weights' gradient step by step they spill 24, which nobody has timed.
_MANY = Config.of(
    "triton",
    **{"score_n": 128, "score_d": 32, "score_stages": 4, "score_warps": 8},
    **{"grad_n": 64, "grad_stages": 3, "grad_warps": 4, "token_n": 128, "token_warps": 8},
)
_CHOSEN = _MANY.replace(score_n=64, score_d=64, score_stages=3, score_warps=4, grad_stages=2)
_SMALL = Config.of(
    "triton",
    **{"score_n": 64, "score_d": 32, "score_stages": 2, "score_warps": 4},
    **{"grad_n": 32, "grad_stages": 2, "grad_warps": 4, "token_n": 64, "token_warps": 4},
)


class IndexerBackwardKernels(Kernels[IndexerBackwardSpec, IndexerBackwardSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("score_n", (32, 64, 128), "tokens per program of the scores"),
            Parameter("score_d", (32, 64), "channels per step of the scores"),
            Parameter("score_stages", (2, 3, 4), "stages of the scores' loop"),
            Parameter("score_warps", (4, 8), "warps per program of the scores"),
            Parameter("grad_n", (32, 64, 128), "tokens per step of the queries' gradients"),
            Parameter("grad_stages", (2, 3, 4), "stages of the loop of the queries' gradients"),
            Parameter("grad_warps", (4, 8), "warps per program of the queries' gradients"),
            Parameter("token_n", (64, 128), "tokens per program of the keys' gradient of whole windows"),
            Parameter("token_warps", (4, 8), "warps per program of the keys' gradient of whole windows"),
        )

    def constraints(self, spec: IndexerBackwardSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        padded, own = _padded(spec.heads), _padded(spec.index_heads)
        width = padded_to(spec.index_head_dim)
        sums = {"score": config["score_n"] * (padded + own), "grad": own * width + config["grad_n"] * (own + width)}
        sums["token"] = config["token_n"] * (width + 2 * own)
        for step, values in sums.items():
            yield from exceeds(f"{step} registers", values / (32 * config[f"{step}_warps"]), 160)  # at 192 they spill 168 bytes
        for step, need in _smem(spec, config).items():
            yield from exceeds(f"{step} smem", need, gpu.smem_per_block, " B")

    def guesses(self, spec: IndexerBackwardSpec, sizes: IndexerBackwardSizes, gpu: Gpu) -> Iterable[Config]:
        first = _MANY if spec.dense else _CHOSEN
        return (first, _MANY.replace(score_stages=2, grad_n=32, grad_stages=2, token_n=64), _SMALL, _SMALL.replace(score_n=32))

    def derived(self, spec: IndexerBackwardSpec, config: Config) -> dict[str, Scalar]:
        return {
            "dense": spec.dense,
            "padded_dim": padded_to(spec.index_head_dim),
            "score_masked": spec.d_qk % int(config["score_d"]) != 0,
            "padded": _padded(spec.heads),
            "index_padded": _padded(spec.index_heads),
            "tiles": -(-spec.topk // int(config["score_n"])),
            "row": _ROW,
            "rows": _ROWS,
            "flat": _FLAT,
            "splits": _SPLITS,
        }

    def launches(
        self, spec: IndexerBackwardSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        if not inputs["q"].numel() or not inputs["kv"].numel():
            for output in outputs.values():
                output.zero_()
            return ()
        return tuple(_launches(spec, config, inputs, outputs))


def _launches(spec: IndexerBackwardSpec, config: Config, inputs: Inputs, outputs: Outputs) -> Iterator[Launch]:
    attention, indexer = ([inputs[name] for name in names] for names in (("q", "kv", "total"), ("iq", "ik", "iw")))
    windows = [inputs["starts"], inputs["ends"]]
    columns = windows if spec.dense else [inputs["indices"]]
    queries, tokens = len(inputs["q"]), len(inputs["kv"])
    width = tokens if spec.dense else spec.topk
    chunk = _chunk(spec, inputs, width)
    target, logit = (_empty(inputs["q"], chunk, width) for _ in range(2))
    count = tokens * spec.index_head_dim
    sums = _empty(inputs["q"], _SPLITS if spec.dense else 1, tokens, spec.index_head_dim)
    spread = [outputs["diq"], outputs["diw"]]
    rows = _empty(inputs["q"], chunk, spec.topk, spec.index_head_dim) if spec.deterministic else sums
    yield Launch("clear", (-(-sums.numel() // _FLAT), 1, 1), (sums, sums.numel()))
    for first in range(0, queries, chunk):
        n = min(chunk, queries - first)
        given = (*attention, *indexer, *columns, target, logit, first, tokens, inputs["sm_scale"])
        yield Launch("compare", (n * -(-width // int(config["score_n"])), 1, 1), given)
        of_rows = (
            (*windows, target, logit, outputs["loss"], first, tokens) if spec.dense else (target, logit, outputs["loss"], first)
        )
        yield Launch("normalise", (n, 1, 1), of_rows)
        written = spread if spec.dense else [*spread, rows]
        yield Launch("query_gradient", (n, 1, 1), (*indexer, *columns, logit, *written, first, tokens))
        if spec.dense:
            grid = (-(-tokens // int(config["token_n"])) * _SPLITS, 1, 1)
            yield Launch("token_gradient", grid, (*indexer, *windows, logit, sums, first, n, tokens))
        elif spec.deterministic:
            number = first // chunk
            places = (number * chunk * spec.topk, number * (tokens + 1))
            yield Launch("gather", (tokens, 1, 1), (rows, inputs["order"], inputs["offsets"], sums, *places))
    yield Launch("settle", (-(-count // _FLAT), 1, 1), (sums, outputs["dik"], count))


def _chunk(spec: IndexerBackwardSpec, inputs: Inputs, width: int) -> int:
    """Queries whose rows are in memory at a time: with lists, as many as these are made for."""
    if spec.deterministic:
        return int(inputs["order"].shape[1]) // spec.topk
    return max(1, min(len(inputs["q"]), _BYTES // (8 * width)))


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=like.device)


def _padded(heads: int) -> int:
    """Heads, padded to what a matrix product takes."""
    return max(16, next_power_of_two(heads))


def _smem(spec: IndexerBackwardSpec, config: Config) -> dict[str, int]:
    """Bytes of shared memory of each step: tiles in flight, and what is turned or rounded on its way to a product."""
    padded, own, width = _padded(spec.heads), _padded(spec.index_heads), padded_to(spec.index_head_dim)
    score = 2 * config["score_d"] * (config["score_n"] + padded) * config["score_stages"]
    score = max(score, 2 * width * (config["score_n"] + own))
    tile = config["grad_n"]
    grad = 2 * own * width + tile * (2 * width * config["grad_stages"] + 4 * width + 4 * own)
    token = 2 * width * (config["token_n"] + 2 * own) + 4 * config["token_n"] * own
    return {"score": int(score), "grad": int(grad), "token": int(token)}
