"""Kernels that read slots of a paged cache back into flat rows (Triton)."""

from __future__ import annotations

from collections.abc import Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs
from ..paged_rows import PagedRowsKernels
from .problem import GatherPagedSizes, GatherPagedSpec


class GatherPagedKernels(PagedRowsKernels[GatherPagedSpec, GatherPagedSizes]):
    """See the module's first lines."""

    def launches(self, spec: GatherPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        cache, slots = inputs["cache"], inputs["slots"]
        rows = slots.shape[0]
        if not rows:
            return ()
        shared = (inputs["scale"],) if "scale" in inputs else ()
        args = (
            cache,
            slots,
            *outputs.values(),
            rows,
            cache.shape[0] * spec.page,
            cache.stride(0) * cache.element_size(),
            *shared,
        )
        return (Launch("gather_paged", (-(-rows // config["block_t"]), 1, 1), args),)
