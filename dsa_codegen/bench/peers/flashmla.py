"""FlashMLA's sparse attention, prefill and decode, as sglang-kernel ships it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import needs_gpu, sgl_kernel

HEADS = (64, 128)
"""The only numbers of heads that it serves; others are padded, as its users do."""
HEAD_DIMS = (512, 576)
LIBRARY = "flashmla_ops.abi3.so"
_D_V = 512
_ENTRIES = {"attention_prefill": 128, "attention_decode": 64}  # k must be a multiple of these
_V4_BYTES = 584  # of a token of the cache that goes with 512 channels

Attend = Callable[[Tensor, Tensor], Sequence[Tensor]]


def reason() -> str | None:
    """Why it cannot be used here."""
    return needs_gpu(90) or sgl_kernel(LIBRARY)


def served_heads(heads: int) -> int:
    """The number of heads that a call of ``heads`` runs as."""
    return next((served for served in HEADS if served >= heads), HEADS[-1])


def padded(q: Tensor) -> Tensor:
    """Queries [..., heads, d] with zeros up to a served number of heads; those that need none as they are."""
    missing = served_heads(q.shape[-2]) - q.shape[-2]
    return torch.nn.functional.pad(q, (0, 0, 0, missing)) if missing else q


def label(heads: int) -> str:
    """FlashMLA, and how a case was padded for it."""
    served = served_heads(heads)
    return "FlashMLA" if served == heads else f"FlashMLA (padded to {served})"


def prefill_of(kv: Tensor, sm_scale: float) -> Attend:
    """Sparse prefill attention of queries and indices; its first result is the output.

    The call is the library's own: behind its kernel it launches two small ones that bring maxima and lse to base 2.
    """
    attend = torch.ops.sgl_kernel.sparse_prefill_fwd.default
    return lambda q, indices: attend(q, kv, indices, sm_scale, _D_V)


def decode_of(cache: Tensor, shape: torch.Size, context: int, topk: int, sm_scale: float) -> Attend:
    """FP8 decode attention of queries of that shape and of slots; its schedule is made beforehand."""
    batch, next_n, heads, _ = shape
    lengths = torch.full((batch,), context, dtype=torch.int32, device=cache.device)
    table = torch.zeros(batch, 1, dtype=torch.int32, device=cache.device)  # for dense attention only
    library = torch.ops.sgl_kernel
    tiles, splits = library.get_mla_decoding_metadata.default(lengths, next_n * heads, 1, heads, True, topk)
    attend = library.fwd_kvcache_mla.default
    return lambda q, slots: attend(q, cache, _D_V, lengths, table, sm_scale, False, tiles, splits, True, slots)


def as_tokens(cache: Tensor, page: int) -> Tensor:
    """A v4 cache [blocks, padded bytes] as [blocks, page, 1, 584], the shape in which the library asks for it."""
    if cache.dim() == 4:
        return cache
    return cache.as_strided((len(cache), page, 1, _V4_BYTES), (cache.stride(0), _V4_BYTES, _V4_BYTES, 1))


class FlashMla(Peer):
    """See the module's first lines."""

    name = "FlashMLA"
    stages = ("attention_prefill", "attention_decode")
    distributions = ("sglang-kernel",)

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case.stage

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        heads, topk = case["heads"], case["k"]
        if heads > HEADS[-1] or case["head_dim"] not in HEAD_DIMS or topk % _ENTRIES[case.stage]:
            return None
        q, indices, sm_scale = padded(inputs["q"]), inputs["indices"], inputs["sm_scale"]
        if case.stage == "attention_prefill":
            attend = prefill_of(inputs["kv"], sm_scale)
        else:
            attend = decode_of(as_tokens(inputs["cache"], case["page"]), q.shape, case["context"], topk, sm_scale)
        return Prepared(label(heads), lambda: attend(q, indices), lambda results: {"out": results[0][..., :heads, :]})


PEERS = (FlashMla(),)
