"""Tiles of heads and tokens in TileLang and Triton: what they cannot do, their shared memory, names for the templates."""

from __future__ import annotations

from collections.abc import Iterable

from ...gpu import Gpu
from ...problem.channels import D_V, padded, padded_to
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar
from . import fp8
from .parameters import SPECIALISED_THREADS
from .problem import AttentionSpec

# The configs to try in turn. The specialised pipeline pads to 64 heads and still wins below: 1968 µs against 2017 (Triton, 16
# heads) and 1973 against 4143 (multistage, 32), the gather being the limit.
SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=SPECIALISED_THREADS)
FEW = Config.of("triton", block_h=16, block_n=64, num_stages=3, num_warps=4)
_WIDE = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8)
DEFAULTS = (SPECIALISED, _WIDE, _WIDE.replace(block_n=32, num_stages=3), _WIDE.replace(block_h=32, block_n=32, num_stages=3))
_FP8_STEP = 32  # channels that a product of FP8 takes at least


def head_blocks(spec: AttentionSpec, config: Config) -> int:
    """Blocks of a query."""
    return -(-spec.heads // int(config["block_h"]))


def constraints(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What such blocks cannot do."""
    if config.backend == "triton":
        # The output's accumulator lies in registers; beyond 128 of 255 (block_h 64 on 4 warps) 1160 bytes spill.
        values = config["block_h"] * padded_to(spec.d_v) / (32 * config["num_warps"])
        yield from exceeds("accumulator registers", values, 128)
    else:
        yield from _tilelang_constraints(config, gpu)
    # A block that serves no head at all would only cost time.
    yield from exceeds("padded heads", config["block_h"], max(64 if _specialised(config) else 16, 2 * spec.heads - 1))
    yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")


def order(config: Config) -> str:
    """A query's list tile by tile."""
    if _specialised(config):
        return "specialised"
    shape = ("block_h", "block_n", "num_warps" if config.backend == "triton" else "threads")
    return "-".join([config.backend, *(str(config[name]) for name in shape)])


def derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    """Names for the templates."""
    values: dict[str, Scalar] = {
        "d_tail": spec.d_qk - spec.d_v,
        "padded_v": padded_to(spec.d_v),
        "padded_tail": _padded_tail(spec),
        "head_blocks": head_blocks(spec, config),
    }
    if spec.math == "fp8":
        values["top"] = fp8.TOP
    if config.backend == "tilelang":
        gatherers = 128 if _specialised(config) else config["threads"]
        values["rounds"] = config["block_n"] * 8 // gatherers
        values["q_rounds"] = -(-config["block_h"] * 8 // gatherers)
    return values


def _padded_tail(spec: AttentionSpec) -> int:
    tail = padded_to(spec.d_qk - spec.d_v)
    return max(tail, _FP8_STEP) if tail and spec.math == "fp8" else tail


def _specialised(config: Config) -> bool:
    return config.backend == "tilelang" and config["pipeline"] == "specialised"


def _tilelang_constraints(config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the TileLang template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    threads = config["threads"]
    if _specialised(config):
        wanted = {"block_h": 64, "block_n": 64, "num_stages": 2, "threads": SPECIALISED_THREADS}
        for name, value in wanted.items():
            if config[name] != value:
                yield Violation(name, abs(config[name] / value - 1), f"{name}: the specialised pipeline is built for {value}")
        return
    yield from exceeds("threads", threads, 256)
    yield from exceeds("accumulator registers", config["block_h"] * D_V / threads, 128)
    if config["block_h"] < 64:  # mma.sync: each warp takes a share of the columns, at least 8
        yield from exceeds("columns per warp", 8, config["block_n"] * 32 / threads)


def _smem(spec: AttentionSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory per block, as the compilers report them, and up to 4 KB more."""
    block_h, block_n, stages = config["block_h"], config["block_n"], config["num_stages"]
    width = padded(spec.d_qk, spec.d_v)
    q, tile, weights = 2 * block_h * width, 2 * block_n * width, 2 * block_h * block_n
    small = 4096
    if config.backend == "tilelang":
        if _specialised(config):  # the weights take the tails' place, which is there without a tail too
            return q + 2 * (2 * block_n * D_V + weights) + small
        return q + stages * tile + weights + small
    if block_h < 64 or gpu.capability < 90 or gpu.capability >= 120:  # mma.sync: operands wait in registers
        # The one tile of a short list is in no loop, and is copied between its two products: up to as much again.
        tiles = 2 if spec.topk <= block_n else max(1, (stages - 1) // 2)
        return q + tiles * tile + weights + small
    # Half of the stages fetch indices. Datacentre Blackwell keeps a copy of q and of the weights besides.
    return q + max(2, (stages + 1) // 2) * tile + small + (64 * 1024 if gpu.capability >= 100 else 0)
