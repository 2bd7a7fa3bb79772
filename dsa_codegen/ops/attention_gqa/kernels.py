"""Kernels of sparse grouped-query attention (Triton): tiles of gathered keys and values, against a KV head's query heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ...gpu import Gpu
from ...problem.checks import pieces, step
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import AttentionGqaSizes, AttentionGqaSpec

_COMBINE_S = 16  # parts of a step of `combine`: all its loads are in flight at once
_PARTIAL_BYTES = 1 << 30  # of the parts that splits leave, at most
_MANY_ROWS = 1024
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class AttentionGqaKernels(Kernels[AttentionGqaSpec, AttentionGqaSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_h", (16, 32, 64, 128), "rows of a product: heads of a KV head for each row that shares, padded"),
            Parameter("block_n", (64, 32, 128), "tokens gathered per step"),
            Parameter("num_stages", (3, 2, 4, 5, 7), "stages of the loop; tokens' numbers take half of them"),
            Parameter("num_warps", (4, 2, 8), "warps per block"),
            Parameter("splits", _SPLITS, "blocks that share a row's tiles", launch_only=True),
        )

    def constraints(self, spec: AttentionGqaSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        block_h, block_n, warps = config["block_h"], config["block_n"], config["num_warps"]
        yield from exceeds("padded heads", block_h, max(16, 2 * spec.share * spec.group - 1))
        yield from exceeds("rows that share", spec.share, block_h)
        k_block, v_block = _padded(spec)
        # The output's accumulator and a tile's scores lie in registers.
        yield from exceeds("accumulator registers", block_h * v_block / (32 * warps), 128)
        yield from exceeds("score registers", block_h * block_n / (32 * warps), 64)
        if not _warpgroups(config, gpu):  # mma.sync: its operands pass through registers
            yield from exceeds("tile registers", block_n * max(k_block, v_block) / (32 * warps), 256)
            yield from exceeds("tokens per warp", 8 * warps, block_n)
        else:
            yield from exceeds("warps of a group", 4, warps)
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def order(self, spec: AttentionGqaSpec, config: Config) -> str | None:
        """A row's list tile by tile, in as many parts as the config says; a union of lists is in its neighbours' order."""
        shape = ("block_h", "block_n", "num_warps", "splits")
        return None if spec.share > 1 else "-".join(str(config[name]) for name in shape)

    def guesses(self, spec: AttentionGqaSpec, sizes: AttentionGqaSizes, gpu: Gpu) -> Iterable[Config]:
        # H200, 16 heads a KV head: 4096 rows of 32768 tokens in blocks of 128 take 2083 µs by the narrow tiles and 2296 by the
        # wide ones, 64 rows over pages 78 and 69.
        narrow = Config.of("triton", block_h=16, block_n=32, num_stages=3, num_warps=2, splits=1)
        few = narrow.replace(block_n=64, num_warps=4)
        wide = few.replace(block_h=min(64, next_power_of_two(max(spec.share * spec.group, 16))))
        first = narrow if wide == few and sizes.rows >= _MANY_ROWS else wide
        for config in (first, wide, wide.replace(block_n=32), few, narrow, narrow.replace(num_stages=2)):
            # One part of a batch-invariant row: how many a single one wants, thousands have no memory for.
            yield config.replace(splits=1 if spec.batch_invariant else _splits(spec, config, sizes, gpu))

    def derived(self, spec: AttentionGqaSpec, config: Config) -> dict[str, Scalar]:
        k_block, v_block = _padded(spec)
        return {
            "k_block": k_block,
            "v_block": v_block,
            "heads_b": _heads(spec, config),
            "head_blocks": _head_blocks(spec, config),
            "list_block": next_power_of_two(spec.topk) if spec.share > 1 else 0,
            "combine_s": _COMBINE_S,
        }

    def launches(self, spec: AttentionGqaSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, k, v, table = (inputs[name] for name in ("q", "k", "v", "page_table"))
        out, lse = outputs["out"], outputs["lse"]
        rows, tokens = len(q), len(k) if table is None else table.shape[1] * spec.page
        if not rows:
            return ()
        if not tokens or not len(k) or not spec.topk:
            out.zero_()
            lse.fill_(-math.inf)
            return ()
        bundles = -(-rows // spec.share)
        splits = max(1, min(config["splits"], _PARTIAL_BYTES // (4 * spec.d_v * rows * spec.heads)))
        parts = rows * spec.heads * splits if splits > 1 else 0
        partial_out = torch.empty(parts, spec.d_v, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        before, lists, strides = _lists(spec, inputs, bundles, tokens)
        optional = [inputs[name] for name in ("ends", "page_table", "sink") if inputs[name] is not None]
        tensors = (q, k, v, *lists, *optional, out, lse, partial_out, partial_lse)
        scalars = (rows, tokens, spec.topk, pieces(q, 0), pieces(q, 1), *_places(k), *_places(v), *strides)
        if table is not None:
            scalars += (pieces(k, 0), pieces(v, 0), len(k), step(table, 0), rows // len(table))
        grid = (bundles * spec.kv_heads * _head_blocks(spec, config) * splits, 1, 1)
        main = Launch("attention_gqa", grid, (*tensors, *scalars, splits, inputs["sm_scale"]))
        if splits == 1:
            return (*before, main)
        joined = [tensor for tensor in (inputs["sink"], partial_out, partial_lse, out, lse) if tensor is not None]
        return (*before, main, Launch("combine", (rows * spec.heads, 1, 1), (*joined, splits)))


def _lists(
    spec: AttentionGqaSpec, inputs: Inputs, bundles: int, tokens: int
) -> tuple[tuple[Launch, ...], tuple[torch.Tensor, ...], tuple[int, ...]]:
    """(what is launched before, lists, their strides): those that came, or those of rows that share, joined."""
    lists, lengths = inputs["indices"], inputs["lengths"]
    given = (lists,) if lengths is None else (lists, lengths)
    strides = step(lists, 0), step(lists, 1)
    if spec.share == 1:
        return (), given, strides
    shape = bundles, spec.kv_heads, spec.share * spec.topk
    unions, members, counts = lists.new_empty(shape), lists.new_empty(shape), lists.new_empty(shape[:2])
    args = (*given, unions, members, counts, len(lists), -(-tokens // spec.block), spec.topk, *strides)
    return (Launch("unite", (bundles * spec.kv_heads, 1, 1), args),), (unions, members, counts), ()


def _places(rows: torch.Tensor) -> tuple[int, int]:
    """Pieces of 16 bytes from one token to the next, and from one head to the next."""
    return pieces(rows, rows.dim() - 3), pieces(rows, rows.dim() - 2)


def _padded(spec: AttentionGqaSpec) -> tuple[int, int]:
    """Channels of a key and of a value, as products take them."""
    return next_power_of_two(spec.d_qk), next_power_of_two(spec.d_v)


def _heads(spec: AttentionGqaSpec, config: Config) -> int:
    """Heads that a block takes of each row."""
    return max(1, int(config["block_h"]) // spec.share)


def _head_blocks(spec: AttentionGqaSpec, config: Config) -> int:
    return -(-spec.group // _heads(spec, config))


def _splits(spec: AttentionGqaSpec, config: Config, sizes: AttentionGqaSizes, gpu: Gpu) -> int:
    """As many as make eight warps for each SM of blocks with two tiles or more; more of them cost more than they gain.

    On an H200, of 1, 8 and 64 rows with 4 KV heads: 16, 8 and 1 were the best of all, at 7, 14 and 69 µs.
    """
    blocks = -(-max(1, sizes.rows) // spec.share) * spec.kv_heads * _head_blocks(spec, config)
    tiles = -(-spec.topk * spec.block // config["block_n"])
    most = min(8 * gpu.sms // (config["num_warps"] * blocks), tiles // 2)
    return max(splits for splits in _SPLITS if splits <= max(most, 1))


def _warpgroups(config: Config, gpu: Gpu) -> bool:
    """Whether the products run on whole tiles from shared memory (wgmma, tcgen05), not on warps' registers (mma.sync)."""
    return config["block_h"] >= 64 and 90 <= gpu.capability < 120


def _smem(spec: AttentionGqaSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory per block: queries, keys and values in flight, weights; as the compiler reports them, or more."""
    block_h, block_n, stages = config["block_h"], config["block_n"], config["num_stages"]
    k_block, v_block = _padded(spec)
    # Tokens with numbers of their own wait for these: a tile in flight takes two stages, where threads share the numbers.
    alone = spec.block >= block_n or block_n >= 32 * config["num_warps"]
    ahead = stages - 1 if alone else (stages - 1) // 2
    tiles = max(2, ahead + 1) if _warpgroups(config, gpu) else max(1, ahead)
    # Of the tiles on their way: those numbers, and which of the queries that share a list have a token in theirs.
    numbers = (0 if alone else 8 * block_n * (stages - 1)) + (4 * block_n * ahead if spec.share > 1 else 0)
    loop = 2 * block_h * (k_block + block_n) + tiles * 2 * block_n * (k_block + v_block) + max(numbers, 2048)
    return max(loop, 4 * block_h * v_block)  # behind it sums change places between threads
