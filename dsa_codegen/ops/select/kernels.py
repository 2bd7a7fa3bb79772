"""Kernels of the selection: a row's scores against a sampled threshold, by one block or by several (TileLang, Triton).

In CUDA C++ a row lies in the registers of a cluster of blocks (``cuda``), as long as it fits there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ...gpu import Gpu
from ...problem.op import Case, Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Bucket, Scalar, next_power_of_two
from . import cuda, streamed
from .problem import (
    SCORES,
    SelectSizes,
    SelectSpec,
)

POOL_HEAD = 32  # int32 words before a pool's keys


class SelectKernels(Kernels[SelectSpec, SelectSizes]):
    """See the module's first lines."""

    backends = ("tilelang", "cuda", "triton")
    budgeted = True

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        if backend == "cuda":
            return cuda.PARAMETERS
        shared = (
            Parameter(
                "scheme", ("row", "split"), "one block per row, or several and a second kernel that joins what they kept"
            ),
            Parameter("capacity", (4096, 256, 512, 1024, 2048, 8192, 16384), "scores that are kept of a row"),
        )
        if backend == "triton":
            return (
                *shared,
                Parameter("block_n", (4096, 128, 1024, 2048, 8192), "scores per step"),
                Parameter("sample", (4096, 256, 1024, 2048), "sampled scores"),
                Parameter("num_warps", (8, 4, 16), "warps per block"),
                Parameter("splits", (1, 2, 4, 8, 16, 32), "blocks per row", launch_only=True),
            )
        return (
            *shared,
            Parameter("threads", (512, 128, 256, 1024), "threads per block"),
            Parameter("vectors", (2, 1, 4), "16-byte loads per lane and tile"),
            Parameter("bins_log2", (11, 10, 12), "bits of a digit of the searches"),
            Parameter("sample_vectors", (1, 2, 4), "16-byte loads per thread for the sample"),
            Parameter("whole", (False, True), "whether windows that fit are kept whole, without a sample"),
            Parameter("blocks_per_sm", (2, 1, 3, 4), "blocks whose registers must fit an SM"),
            Parameter("splits", (1, 2, 4, 8, 16, 32), "blocks per row", launch_only=True),
        )

    def constraints(self, spec: SelectSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "cuda":
            yield from cuda.constraints(spec, config, gpu)
            return
        # The sample is wrong by some standard deviations: room for a quarter more than is wanted.
        yield from exceeds("capacity", spec.topk + max(spec.topk // 4, 64), config["capacity"])
        if (config["scheme"] == "row") != (config["splits"] == 1):
            yield Violation("splits", 1.0, "splits: one with scheme row, several with scheme split")
        if config.backend == "triton":
            # The pool lies in registers, keys, tokens and ranks.
            yield from exceeds("pool registers", config["capacity"] / (32 * config["num_warps"]), 16)
            yield from exceeds("step registers", config["block_n"] / (32 * config["num_warps"]), 32)
            yield from exceeds("sample registers", config["sample"] / (32 * config["num_warps"]), 16)
            return
        if gpu.capability < 90:  # its launches overlap with their neighbours', which older GPUs cannot
            reason = f"capability: dependent launches need sm_90 or newer, {gpu.name} is sm_{gpu.capability}"
            yield Violation("capability", 1.0, reason)
        threads, blocks, values = config["threads"], config["blocks_per_sm"], _derived(spec, config)
        yield from exceeds("threads per histogram", threads, 1 << config["bins_log2"])
        yield from exceeds("pool registers", config["capacity"] / threads, 16)
        yield from exceeds("threads per SM", threads * blocks, gpu.threads_per_sm)
        yield from exceeds("scores per lane", config["vectors"] * values["vector"], 16)
        # A fit to what ptxas reports: kept scores are moved with their tokens, a tile waits while its scores are ranked.
        registers = 6 + 7 * config["capacity"] // (2 * threads) + config["vectors"] * values["vector"]
        yield from exceeds("registers", registers * threads * blocks, gpu.regs_per_sm)
        smem = 8 * config["capacity"] + 4 * ((1 << config["bins_log2"]) + values["max_tiles"]) + 1024
        yield from exceeds("smem", smem, gpu.smem_per_block, " B")
        yield from exceeds("smem per SM", smem * blocks, gpu.smem_per_sm, " B")

    def reach(self, spec: SelectSpec, config: Config, bucket: Bucket) -> Iterable[Violation]:
        return cuda.reach(config, bucket) if config.backend == "cuda" else ()

    def within_reach(self, spec: SelectSpec, config: Config, case: Case[SelectSizes]) -> Case[SelectSizes]:
        return cuda.within_reach(config, case) if config.backend == "cuda" else case

    def guesses(self, spec: SelectSpec, sizes: SelectSizes, gpu: Gpu) -> Iterable[Config]:
        first, in_registers = cuda.is_first_choice(sizes), list(cuda.guesses(sizes))
        if in_registers and first:
            yield from in_registers
        else:
            yield from streamed.guesses(sizes)
        yield from self._sampled(spec, sizes, gpu)
        if not first:
            yield from in_registers

    def _sampled(self, spec: SelectSpec, sizes: SelectSizes, gpu: Gpu) -> Iterator[Config]:
        capacity = next(c for c in (256, 512, 1024, 2048, 4096, 8192) if c >= spec.topk * 3 // 2)
        threads = min(512 if capacity <= 4096 else 1024, capacity)
        config = Config.of(
            "tilelang",
            scheme="row",
            capacity=capacity,
            threads=threads,
            vectors=4 if spec.scores == "fp32" else 2,  # a lane's 16 scores share one scan and one reservation
            bins_log2=11,
            sample_vectors=4 if sizes.columns > 65536 else 2,
            whole=False,
            blocks_per_sm=2 if threads <= 512 else 1,
            splits=1,
        )
        if sizes.rows <= gpu.sms:  # few rows: latency counts, many threads shorten it
            config = config.replace(threads=min(1024, capacity), blocks_per_sm=1)
            if sizes.columns <= 8192 or sizes.rows > 16:  # 64 rows of 65536: 21 us, 32 where four blocks share a row
                config = config.replace(bins_log2=10)
            else:
                config = config.replace(scheme="split", vectors=1, splits=_splits(sizes, gpu))
        yield config
        yield config.replace(blocks_per_sm=1)
        splits = _splits(sizes, gpu) if sizes.rows <= 16 and sizes.columns > 8192 else 1
        yield Config.of(
            "triton",
            scheme="row" if splits == 1 else "split",
            capacity=max(capacity, 4096),
            block_n=4096,
            num_warps=8,
            sample=2048,
            splits=splits,
        )

    def derived(self, spec: SelectSpec, config: Config) -> dict[str, Scalar]:
        return cuda.derived(spec, config) if config.backend == "cuda" else _derived(spec, config)

    def launches(self, spec: SelectSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        scores, chosen, table = inputs["scores"], outputs["chosen"], inputs["page_table"]
        rows, limit = scores.shape
        if not rows:
            return ()
        if table is not None:
            limit = min(limit, table.shape[1] * spec.page)
        if not limit:
            chosen.fill_(-1)
            return ()
        if config.backend == "cuda":
            return cuda.launches(spec, config, inputs, outputs, limit, gpu)
        starts = () if inputs["starts"] is None else (inputs["starts"],)
        window = (scores, *starts, inputs["ends"])
        tables = () if table is None else (table,)
        splits, triton = config["splits"], config.backend == "triton"
        programs = min(rows, 4 * gpu.sms)
        stride = (scores.stride(0),) if triton else ()
        pages = (table.stride(0), rows // len(table)) if triton and table is not None else ()
        if config["scheme"] == "row" and not triton:
            return (Launch("select_row", (rows, 1, 1), (*window, *tables, chosen, limit)),)
        pools = scores.new_empty(
            programs if config["scheme"] == "row" else rows, splits, POOL_HEAD + 2 * config["capacity"], dtype=torch.int32
        )
        if config["scheme"] == "row":
            args = (*window, *tables, pools, chosen, rows, limit, *stride, *pages)
            return (Launch("select_row", (programs, 1, 1), args),)
        count = (splits,) if triton else ()
        kept = () if triton else (spec.topk,)
        return (
            Launch("select_keep", (rows, splits, 1), (*window, pools, limit, *stride, *count, *kept)),
            Launch("select_finish", (rows, 1, 1), (*window, *tables, pools, chosen, limit, *stride, *count, *pages)),
        )


def _splits(sizes: SelectSizes, gpu: Gpu) -> int:
    """Blocks per row that fill the GPU once or twice and leave each at least 4096 scores."""
    splits = 2
    while splits < 32 and splits * sizes.rows < gpu.sms and sizes.columns >= 8192 * splits:
        splits *= 2
    return splits


def _derived(spec: SelectSpec, config: Config) -> dict[str, Any]:
    # Of independent scores, 4 standard deviations fail once in 30 000 rows; neighbours are alike, though.
    guess: dict[str, Any] = {"margin": 5}
    if config.backend == "triton":
        pool = POOL_HEAD + 2 * config["capacity"]
        sample_log2 = config["sample"].bit_length() - 1
        guess["balance"] = math.isqrt(spec.topk * config["capacity"])
        return {"block_k": next_power_of_two(spec.topk), "pool": pool, "sample_log2": sample_log2, **guess}
    vector = 16 // SCORES[spec.scores].itemsize
    tile = 32 * config["vectors"] * vector
    longest = 1 << (20 if config["scheme"] == "row" else 18)  # scores of a row or of a split whose tiles have a place
    return {
        "vector": vector,
        **guess,
        "max_tiles": longest // tile,
        "whole_limit": config["capacity"] if config["whole"] else 0,
    }
