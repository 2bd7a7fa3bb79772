"""Kernels that quantise rows into their slots of a paged cache (Triton)."""

from __future__ import annotations

from collections.abc import Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs
from ...problem.values import Scalar
from ..paged_rows import PagedRowsKernels
from ..rows import limits
from .problem import QuantizePagedSizes, QuantizePagedSpec


class QuantizePagedKernels(PagedRowsKernels[QuantizePagedSpec, QuantizePagedSizes]):
    """See the module's first lines."""

    def derived(self, spec: QuantizePagedSpec, config: Config) -> dict[str, Scalar]:
        return {**super().derived(spec, config), **limits()}

    def launches(self, spec: QuantizePagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        cache, source, rope = inputs["cache"], inputs["source"], inputs.get("rope")
        rows = source.shape[0]
        if not rows:
            return ()
        strides = (source.stride(0),) if rope is None else (source.stride(0), rope.stride(0))
        args = (*inputs.values(), rows, cache.shape[0] * spec.page, cache.stride(0), *strides)
        return (Launch("quantize_paged", (-(-rows // config["block_t"]), 1, 1), args),)
