"""Kernels of sparse MLA prefill: warp groups with roles (TileLang), and plain tiles (TileLang, Triton)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar
from .problem import D_V, AttentionSizes, AttentionSpec

_SPECIALISED_THREADS = 384  # one group of 128 gathers, one scores, one adds up
# The configs to try in turn: the first without a violation is the default. The specialised pipeline pads to 64 heads and still
# wins below: 1968 µs against 2017 (Triton, 16 heads) and 1973 against 4143 (multistage, 32), the gather being the limit.
_SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=_SPECIALISED_THREADS)
_WIDE = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8)
_FEW = Config.of("triton", block_h=16, block_n=64, num_stages=3, num_warps=4)
_DEFAULTS = (_SPECIALISED, _WIDE, _WIDE.replace(block_n=32, num_stages=3), _WIDE.replace(block_h=32, block_n=32, num_stages=3))


class AttentionKernels(Kernels[AttentionSpec, AttentionSizes]):
    """See the module's first lines."""

    backends = ("tilelang", "triton")

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        tile = (
            Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
            Parameter("block_n", (32, 64), "tokens gathered per step"),
        )
        if backend == "triton":
            stages = Parameter(
                "num_stages", (2, 3, 5, 7), "stages of the loop: a tile in flight takes two, for indices and rows"
            )
            return (*tile, stages, Parameter("num_warps", (4, 8), "warps per block"))
        stages = Parameter("num_stages", (2, 3, 4, 5, 6), "tiles in flight")
        pipeline = Parameter(
            "pipeline", ("specialised", "multistage"), "warp groups with roles of their own, or all threads doing everything"
        )
        return (*tile, stages, Parameter("threads", (128, 256, _SPECIALISED_THREADS), "threads per block"), pipeline)

    def constraints(self, spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "triton":
            yield from _triton_constraints(spec, config)
        else:
            yield from _tilelang_constraints(spec, config, gpu)
        # A block that serves no head at all would only cost time.
        yield from exceeds("padded heads", config["block_h"], max(64 if _specialised(config) else 16, 2 * spec.heads - 1))
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def guesses(self, spec: AttentionSpec, sizes: AttentionSizes, gpu: Gpu) -> Iterable[Config]:
        return _DEFAULTS if spec.heads > 16 else (_SPECIALISED, _FEW, _FEW.replace(block_n=32), *_DEFAULTS)

    def derived(self, spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
        values: dict[str, Scalar] = {
            "d_v": D_V,
            "d_tail": spec.d_qk - D_V,
            "head_blocks": _head_blocks(spec, config),
        }
        if config.backend == "tilelang":
            gatherers = 128 if _specialised(config) else config["threads"]
            values["rounds"] = config["block_n"] * 8 // gatherers
        return values

    def launches(self, spec: AttentionSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, kv = inputs["q"], inputs["kv"]
        if not len(q):
            return ()
        if not len(kv):
            outputs["out"].zero_()
            for name in outputs.keys() - {"out"}:
                outputs[name].fill_(-math.inf)
            return ()
        optional = [inputs[name] for name in ("lengths", "sink") if inputs[name] is not None]
        tensors = (q, kv, inputs["indices"], *optional, *outputs.values())
        scalars = (len(kv), inputs["sm_scale"]) if config.backend == "triton" else (inputs["sm_scale"],)
        return (Launch("attention", (len(q) * _head_blocks(spec, config), 1, 1), (*tensors, *scalars)),)


def _head_blocks(spec: AttentionSpec, config: Config) -> int:
    return -(-spec.heads // int(config["block_h"]))


def _specialised(config: Config) -> bool:
    return config.backend == "tilelang" and config["pipeline"] == "specialised"


def _triton_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    # The output's accumulator lies in registers; beyond 128 of 255 (block_h 64 on 4 warps) 1160 bytes spill.
    yield from exceeds("accumulator registers", config["block_h"] * D_V / (32 * config["num_warps"]), 128)


def _tilelang_constraints(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the TileLang template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    threads = config["threads"]
    if _specialised(config):
        wanted = {"block_h": 64, "block_n": 64, "num_stages": 2, "threads": _SPECIALISED_THREADS}
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
    q, tile, weights = 2 * block_h * spec.d_qk, 2 * block_n * spec.d_qk, 2 * block_h * block_n
    small = 4096
    if config.backend == "tilelang":
        if _specialised(config):  # the weights take the tails' place, which is there without a tail too
            return q + 2 * (2 * block_n * D_V + weights) + small
        return q + stages * tile + weights + small
    if block_h < 64 or gpu.capability < 90 or gpu.capability >= 120:  # mma.sync: operands wait in registers
        return q + max(1, (stages - 1) // 2) * tile + weights + small
    # Half of the stages fetch indices. Datacentre Blackwell keeps a copy of q and of the weights besides.
    return q + max(2, (stages + 1) // 2) * tile + small + (64 * 1024 if gpu.capability >= 100 else 0)
