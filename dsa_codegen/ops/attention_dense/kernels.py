"""Kernels of dense MLA over windows (Triton): blocks of rows, a row being one head of one query, against tiles of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.channels import padded, padded_to
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar
from .problem import AttentionDenseSizes, AttentionDenseSpec

_WIDE = Config.of("triton", block_m=64, block_n=64, num_stages=2, num_warps=8)
_NARROW = _WIDE.replace(block_n=32, num_stages=2)


class AttentionDenseKernels(Kernels[AttentionDenseSpec, AttentionDenseSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_m", (16, 32, 64, 128), "rows per block"),
            Parameter("block_n", (32, 64), "tokens per step"),
            Parameter("num_stages", (1, 2, 3), "tiles in flight"),
            Parameter("num_warps", (4, 8, 16), "warps per block"),
        )

    def constraints(self, spec: AttentionDenseSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        # The output's accumulator lies in registers, as in the sparse kernel.
        yield from exceeds("accumulator registers", config["block_m"] * padded_to(spec.d_v) / (32 * config["num_warps"]), 128)
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def guesses(self, spec: AttentionDenseSpec, sizes: AttentionDenseSizes, gpu: Gpu) -> Iterable[Config]:
        return (_WIDE, _NARROW, _NARROW.replace(block_m=32), _NARROW.replace(block_m=16, num_warps=4, num_stages=1))

    def derived(self, spec: AttentionDenseSpec, config: Config) -> dict[str, Scalar]:
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
        blocks = -(-len(q) * spec.heads // int(config["block_m"]))
        return (Launch("attend", (blocks, 1, 1), (*tensors, len(q), len(kv), inputs["sm_scale"])),)


def _smem(spec: AttentionDenseSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory: rows and tiles in flight; beside them on other GPUs than Hopper weights, on Blackwell copies."""
    block_m, block_n = config["block_m"], config["block_n"]
    width = padded(spec.d_qk, spec.d_v)
    own = 2 * block_m * width + 2 * block_n * width * config["num_stages"]
    if 90 <= gpu.capability < 100:
        return int(own) + 1024
    return int(own) + 2 * block_m * block_n + 4096 + (64 * 1024 if 100 <= gpu.capability < 120 else 0)
