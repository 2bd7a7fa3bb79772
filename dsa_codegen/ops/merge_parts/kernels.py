"""Kernels that join parts of attention (Triton): a program takes some rows with all their channels, one part after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import MergePartsSizes, MergePartsSpec


class MergePartsKernels(Kernels[MergePartsSpec, MergePartsSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_h", (1, 2, 4, 8, 16), "heads of queries at a time"),
            Parameter("num_warps", (1, 2, 4, 8), "warps per program"),
        )

    def constraints(self, spec: MergePartsSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        # A sum and a part's value of each channel lie in registers.
        values = config["block_h"] * next_power_of_two(spec.d_v)
        yield from exceeds("values per thread", values / (32 * config["num_warps"]), 64)

    def guesses(self, spec: MergePartsSpec, sizes: MergePartsSizes, gpu: Gpu) -> Iterable[Config]:
        if sizes.rows > 16 * gpu.sms:
            yield Config.of("triton", block_h=8, num_warps=4)
        yield Config.of("triton", block_h=2, num_warps=2)
        yield Config.of("triton", block_h=1, num_warps=4)

    def derived(self, spec: MergePartsSpec, config: Config) -> dict[str, Scalar]:
        return {"block_d": next_power_of_two(spec.d_v)}

    def launches(self, spec: MergePartsSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        out, lse, sink = inputs["out"], inputs["lse"], inputs["sink"]
        rows = lse.shape[1] * lse.shape[2]
        if not rows:
            return ()
        tensors = [out, lse, *(() if sink is None else (sink,)), *outputs.values()]
        strides = out.stride(0), lse.stride(0)
        args = (*tensors, rows, len(out), lse.shape[-1], *strides)
        return (Launch("merge_parts", (-(-rows // config["block_h"]), 1, 1), args),)
