"""FlashMLA's sparse attention, prefill and decode, as sglang-kernel ships it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import needs_gpu, sgl_kernel

HEADS = (64, 128)
"""The only numbers of heads that it serves; others are padded, as its users do."""
_D_V = 512

Attend = Callable[[Tensor, Tensor], Sequence[Tensor]]


def served_heads(heads: int) -> int:
    """The number of heads that a call of ``heads`` runs as."""
    return next((served for served in HEADS if served >= heads), HEADS[-1])


def padded(q: Tensor) -> Tensor:
    """Queries [..., heads, d] with zeros up to a served number of heads."""
    return torch.nn.functional.pad(q, (0, 0, 0, served_heads(q.shape[-2]) - q.shape[-2])).contiguous()


def label(heads: int) -> str:
    """FlashMLA, and how a case was padded for it."""
    served = served_heads(heads)
    return "FlashMLA" if served == heads else f"FlashMLA (padded to {served})"


def prefill_of(kv: Tensor, sm_scale: float) -> Attend:
    """Sparse prefill attention of queries and indices; its first result is the output."""
    attend = torch.ops.sgl_kernel.sparse_prefill_fwd.default
    return lambda q, indices: attend(q, kv, indices, sm_scale, _D_V)


def decode_of(cache: Tensor, shape: torch.Size, context: int, topk: int, sm_scale: float) -> Attend:
    """FP8 decode attention of queries of that shape and of slots; its schedule is made beforehand."""
    batch, next_n, heads, _ = shape
    lengths = torch.full((batch,), context, dtype=torch.int32, device=cache.device)
    table = torch.zeros(batch, -(-context // cache.shape[1]), dtype=torch.int32, device=cache.device)
    library = torch.ops.sgl_kernel
    tiles, splits = library.get_mla_decoding_metadata.default(lengths, next_n * heads, 1, heads, True, topk)
    attend = library.fwd_kvcache_mla.default
    return lambda q, slots: attend(q, cache, _D_V, lengths, table, sm_scale, False, tiles, splits, True, slots)


class FlashMla(Peer):
    """See the module's first lines."""

    name = "FlashMLA"
    stages = ("attention_prefill", "attention_decode")
    distributions = ("sglang-kernel",)

    def available(self) -> str | None:
        return needs_gpu(90) or sgl_kernel("flashmla_ops.abi3.so")

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        heads, q, indices = case["heads"], padded(inputs["q"]), inputs["indices"]
        if case.stage == "attention_prefill":
            attend = prefill_of(inputs["kv"], inputs["sm_scale"])
        else:
            attend = decode_of(inputs["cache"], q.shape, case["context"], case["k"], inputs["sm_scale"])
        return Prepared(label(heads), lambda: attend(q, indices), lambda results: {"out": results[0][..., :heads, :]})


PEERS = (FlashMla(),)
