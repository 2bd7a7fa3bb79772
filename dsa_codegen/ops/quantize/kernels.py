"""Kernels that quantise rows (Triton)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.checks import pieces, step
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation
from ...problem.values import Scalar, next_power_of_two
from .. import rows
from .problem import (
    QuantizeSizes,
    QuantizeSpec,
    weight_factor,
)


class QuantizeKernels(Kernels[QuantizeSpec, QuantizeSizes]):
    """See the module's first lines."""

    backends = ("triton",)
    min_capability = 89

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return rows.PARAMETERS

    def constraints(self, spec: QuantizeSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from rows.values_per_thread(config, sum(_parts(spec)))

    def guesses(self, spec: QuantizeSpec, sizes: QuantizeSizes, gpu: Gpu) -> Iterable[Config]:
        # 16 values, 32 bytes of bf16, per thread; few rows are spread over more, smaller blocks.
        if sizes.tokens * spec.heads < 8 * gpu.sms:
            yield Config.of("triton", block_t=1, num_warps=1)
        else:
            yield Config.of("triton", block_t=16, num_warps=4)
        # Rows of more than 256 channels, H200: 271 µs of 524288 rows of 576; a row or more to each of 1 to 8 warps 308 to 337.
        yield Config.of("triton", block_t=2, num_warps=2)
        yield Config.of("triton", block_t=1, num_warps=1)

    def derived(self, spec: QuantizeSpec, config: Config) -> dict[str, Scalar]:
        first, rest = _parts(spec)
        values: dict[str, Scalar] = {"width_padded": first, "parted": rest > 0, "first": first, "rest": rest}
        return {**rows.limits(), **values, "weight_factor": repr(weight_factor(spec))}

    def launches(self, spec: QuantizeSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        count = inputs["source"].shape[0] * spec.heads
        if not count:
            return ()
        source, weights = inputs["source"], inputs.get("weights")
        strides = (source.stride(0),) if weights is None else (pieces(source, 0), pieces(source, 1), step(weights, 0))
        args = (*inputs.values(), *outputs.values(), count, *strides)
        return (Launch("quantize", (-(-count // config["block_t"]), 1, 1), args),)


def _parts(spec: QuantizeSpec) -> tuple[int, int]:
    """How many channels a program takes at once, a power of two, and how many behind them: latents have 512 and 64."""
    padded = next_power_of_two(spec.width)
    if padded == spec.width or spec.weights != "none":
        return padded, 0
    return padded // 2, next_power_of_two(spec.width - padded // 2)
