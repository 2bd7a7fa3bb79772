"""Kernels that quantise rows into their slots of a paged cache (Triton)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Launch, Outputs
from ...problem.values import Scalar
from ..paged_rows import PagedRowsKernels
from ..rows import limits
from .problem import QuantizePagedSizes, QuantizePagedSpec

_CLAIMS = 512  # rows of a block of `claim`
_FEW = 1024  # rows; comparing each with all later ones takes about as long then as the two launches of `claim`


class QuantizePagedKernels(PagedRowsKernels[QuantizePagedSpec, QuantizePagedSizes]):
    """See the module's first lines."""

    def derived(self, spec: QuantizePagedSpec, config: Config) -> dict[str, Scalar]:
        later = min(1024, max(4, 256 * config["num_warps"] // config["block_t"]))  # 8 comparisons a thread
        return {**super().derived(spec, config), **limits(), "later": later, "claims": _CLAIMS}

    def launches(self, spec: QuantizePagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        cache, source, rope = inputs["cache"], inputs["source"], inputs.get("rope")
        rows = source.shape[0]
        if not rows:
            return ()
        strides = (source.stride(0),) if rope is None else (source.stride(0), rope.stride(0))
        slot_count, many = cache.shape[0] * spec.page, rows > _FEW
        owners = torch.empty(slot_count if many else 0, dtype=torch.int32, device=source.device)
        tensors = [value for name, value in inputs.items() if name != "scale"]
        shared = (inputs["scale"],) if "scale" in inputs else ()
        args = (*tensors, owners, rows, slot_count, cache.stride(0) * cache.element_size(), *strides, *shared, int(many))
        claims = [(inputs["slots"], owners, rows, slot_count, last) for last in (0, 1)] if many else []
        return (
            *(Launch("claim", (-(-rows // _CLAIMS), 1, 1), each) for each in claims),
            Launch("quantize_paged", (-(-rows // config["block_t"]), 1, 1), args),
        )
