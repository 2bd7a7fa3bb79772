"""Kernels of dense MLA over windows: pairs of tiles against 64 heads of a query (CUDA C++), blocks of rows (Triton).

The former is the kernel of sparse MLA whose lists are the windows themselves: nothing is read to know a tile's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.channels import padded, padded_to, usual
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar
from .. import pair
from .problem import AttentionDenseSizes, AttentionDenseSpec

# 128 heads, d 576, causal, H200: 3.26 and 13.07 ms of 4096 and 8192 tokens (716 and 715 TFLOPS), interleaved 3.77 and 13.96;
# Triton's 8.13 and 30.61.
_PAIR = Config.of("cuda", interleave=False)
_PAIR_REGISTERS = 216  # per thread that multiplies; of 224 those that gather have too few, and 8 to 16 bytes spill
_WIDE = Config.of("triton", block_m=64, block_n=64, num_stages=2, num_warps=8)
_NARROW = _WIDE.replace(block_n=32, num_stages=2)


class AttentionDenseKernels(Kernels[AttentionDenseSpec, AttentionDenseSizes]):
    """See the module's first lines."""

    backends = ("cuda", "triton")

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        if backend == "cuda":
            return (Parameter("interleave", (False, True), "whether the other group's values come between a tile's scores"),)
        return (
            Parameter("block_m", (16, 32, 64), "rows per block"),
            Parameter("block_n", (32, 64), "tokens per step"),
            Parameter("num_stages", (1, 2, 3), "tiles in flight"),
            Parameter("num_warps", (4, 8), "warps per block"),  # of 16 none has the registers
        )

    def constraints(self, spec: AttentionDenseSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "cuda":
            yield from _pair_constraints(spec, gpu)
            return
        # The output's accumulator lies in registers, as in the sparse kernel.
        yield from exceeds("accumulator registers", config["block_m"] * padded_to(spec.d_v) / (32 * config["num_warps"]), 128)
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def guesses(self, spec: AttentionDenseSpec, sizes: AttentionDenseSizes, gpu: Gpu) -> Iterable[Config]:
        return (_PAIR, _WIDE, _NARROW, _NARROW.replace(block_m=32), _NARROW.replace(block_m=16, num_warps=4, num_stages=1))

    def derived(self, spec: AttentionDenseSpec, config: Config) -> dict[str, Scalar]:
        if config.backend == "cuda":
            block = pair.derived(spec.d_qk, _PAIR_REGISTERS)
            return {"lengths": False, "max_logits": False, "consumer_registers": _PAIR_REGISTERS, **block}
        tail = spec.d_qk - spec.d_v
        return {"d_tail": tail, "padded_v": padded_to(spec.d_v), "padded_tail": padded_to(tail)}

    def launches(
        self, spec: AttentionDenseSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        q, kv = inputs["q"], inputs["kv"]
        if not len(q):
            return ()
        if not len(kv):
            outputs["out"].zero_()
            outputs["lse"].fill_(-math.inf)
            return ()
        sink = [inputs["sink"]] if spec.sink else []
        tensors = (q, kv, inputs["starts"], inputs["ends"], *sink, outputs["out"], outputs["lse"])
        if config.backend == "cuda":
            strides = spec.heads * spec.d_qk, spec.d_qk, spec.d_qk
            blocks = min(len(q) * spec.heads // pair.HEADS, gpu.sms)
            return (Launch("attention", (blocks, 1, 1), (*tensors, len(q), len(kv), *strides, inputs["sm_scale"])),)
        blocks = -(-len(q) * spec.heads // int(config["block_m"]))
        return (Launch("attend", (blocks, 1, 1), (*tensors, len(q), len(kv), inputs["sm_scale"])),)


def _pair_constraints(spec: AttentionDenseSpec, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the CUDA template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    if not usual(spec.d_qk, spec.d_v):
        yield Violation("channels", 1.0, f"channels: {spec.d_qk} of {spec.d_v}, the CUDA template takes 512 + 64 or 512")
    if spec.heads % pair.HEADS:
        yield Violation("heads", 1.0, f"heads: a block takes {pair.HEADS}, of which {spec.heads} are no multiple")
    yield from exceeds("smem", pair.smem(spec.d_qk), gpu.smem_per_block, " B")


def _smem(spec: AttentionDenseSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory: rows and tiles in flight; beside them on other GPUs than Hopper weights, on Blackwell copies."""
    block_m, block_n = config["block_m"], config["block_n"]
    width = padded(spec.d_qk, spec.d_v)
    own = 2 * block_m * width + 2 * block_n * width * config["num_stages"]
    if 90 <= gpu.capability < 100:
        return int(own) + 1024
    return int(own) + 2 * block_m * block_n + 4096 + (64 * 1024 if 100 <= gpu.capability < 120 else 0)
