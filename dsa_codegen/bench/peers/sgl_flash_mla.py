"""FlashMLA's Hopper kernels as they were frozen: sgl-flash-mla's "legacy" operators, of which newer releases have no others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .flashmla import Attend, FlashMlaPeer, Pool
from .libraries import loaded, needs_gpu

NAME = "sgl-flash-mla"
LIBRARY = "_C_legacy.*so"
_D_V = 512
_FORMATS = {576: "V32", 512: "V4"}  # of a cache, by the channels of a query


def reason() -> str | None:
    """Why it cannot be used here."""
    return needs_gpu(90) or loaded("flash_mla", LIBRARY, NAME)


def prefill_of(kv: Tensor, sm_scale: float, sink: Tensor | None = None) -> Attend:
    """Sparse prefill attention; its maxima and lse stay in base 2, which saves the launches that would convert them."""
    attend = torch.ops.flash_mla_legacy.sparse_prefill_fwd.default
    return lambda q, indices: attend(q, kv, indices, sm_scale, _D_V, sink, None, True, True)


def decode_of(
    cache: Tensor,
    shape: torch.Size,
    context: int,
    topk: int,
    sm_scale: float,
    extra: Pool | None = None,
    sink: Tensor | None = None,
) -> Attend:
    """FP8 decode attention; its schedule depends on shapes only, and is the one that its first call made."""
    attend = torch.ops.flash_mla_legacy.sparse_decode_fwd.default
    layout, second = _FORMATS[shape[3]], extra or (None, None)
    schedule: list[Tensor] = []

    def run(q: Tensor, slots: Tensor) -> Sequence[Tensor]:
        tiles, splits = schedule or (None, None)
        results = attend(q, cache, slots, None, sink, tiles, splits, *second, None, _D_V, sm_scale, layout)
        if not schedule:
            schedule.extend(results[2:])
        return results

    q = torch.zeros(shape, dtype=torch.bfloat16, device=cache.device)
    run(q, torch.full((*shape[:2], topk), -1, dtype=torch.int32, device=cache.device))
    return run


PEERS = tuple(FlashMlaPeer(NAME, prefill_of, decode_of, reason, NAME, gathered, pools=2) for gathered in (False, True))
