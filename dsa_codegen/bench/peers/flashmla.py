"""FlashMLA's sparse attention, prefill and decode, as sglang-kernel ships it; and what any copy of FlashMLA asks for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ... import functions
from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared, Run
from .base import Peer
from .libraries import loaded, needs_gpu

HEADS = (64, 128)
"""The only numbers of heads that it serves; others are padded, as its users do."""
HEAD_DIMS = (512, 576)
LIBRARY = "flashmla_ops.abi3.so"
_D_V = 512
STAGES = ("attention_prefill", "attention_prefill_paged", "attention_decode")
_ENTRIES = 64  # k must be a multiple of these over a cache, and of twice as many over latents
_V32_CHANNELS = 576  # of a query of the 656-byte cache
_V4_BYTES = 584  # of a token of the cache that goes with 512 channels

Attend = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Queries and indices to outputs, the first of which is the attention's."""
PrefillOf = Callable[[Tensor, float], Attend]
Pool = tuple[Tensor, Tensor]
"""A second cache, and each row's slots in it."""
DecodeOf = Callable[[Tensor, torch.Size, int, int, float, Pool | None], Attend]


def reason() -> str | None:
    """Why it cannot be used here."""
    return needs_gpu(90) or loaded("sgl_kernel", LIBRARY, "sglang-kernel")


def served_heads(heads: int) -> int:
    """The number of heads that a call of ``heads`` runs as."""
    return next((served for served in HEADS if served >= heads), HEADS[-1])


def padded(q: Tensor) -> Tensor:
    """Queries [..., heads, d] with zeros up to a served number of heads; those that need none as they are."""
    missing = served_heads(q.shape[-2]) - q.shape[-2]
    return torch.nn.functional.pad(q, (0, 0, 0, missing)) if missing else q


def label(name: str, heads: int) -> str:
    """A copy of FlashMLA, and how a case was padded for it."""
    served = served_heads(heads)
    return name if served == heads else f"{name} (padded to {served})"


def serves(case: BenchCase) -> bool:
    """Whether its kernels have the case's heads, channels and k."""
    entries = _ENTRIES * (2 if case.stage == "attention_prefill" else 1)
    return case["heads"] <= HEADS[-1] and case["head_dim"] in HEAD_DIMS and case["k"] % entries == 0


def prefill_of(kv: Tensor, sm_scale: float) -> Attend:
    """Sparse prefill attention of queries and indices; its first result is the output.

    The call is the library's own: behind its kernel it launches two small ones that bring maxima and lse to base 2.
    """
    attend = torch.ops.sgl_kernel.sparse_prefill_fwd.default
    return lambda q, indices: attend(q, kv, indices, sm_scale, _D_V)


def decode_of(cache: Tensor, shape: torch.Size, context: int, topk: int, sm_scale: float, extra: Pool | None = None) -> Attend:
    """FP8 decode attention of queries of that shape and of slots; its schedule is made beforehand. There is no second pool."""
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


def over_cache(case: BenchCase, inputs: Inputs, decode: DecodeOf) -> Run:
    """The decode kernel over the case's cache. The rows of a prompt are sequences of one query, as SGLang calls it there."""
    q, indices = padded(inputs["q"]), inputs["indices"]
    cache = as_tokens(inputs["cache"], case["page"])
    extra = (as_tokens(inputs["extra_cache"], case["page"]), inputs["extra_indices"]) if "extra_k" in dict(case.shape) else None
    attend = decode(cache, q.shape, case["context"], case["k"], inputs["sm_scale"], extra)
    return lambda: attend(q, indices)


def through_latents(inputs: Inputs, prefill: PrefillOf) -> Run:
    """The prefill kernel after the whole cache, of the 656-byte layout, has been read back to BF16 by this package's gather."""
    q, cache, indices = padded(inputs["q"][:, 0]), inputs["cache"], inputs["indices"]
    slots = torch.arange(cache.shape[0] * cache.shape[1], dtype=torch.int32, device=cache.device)
    sm_scale = inputs["sm_scale"]

    def run() -> Sequence[Tensor]:
        latents = functions.gather_kv(cache, slots)[:, None]
        return [prefill(latents, sm_scale)(q, indices)[0][:, None]]

    return run


class FlashMlaPeer(Peer):
    """A copy of FlashMLA.

    Args:
        prefill, decode: make its calls.
        reason: why it cannot be used here.
        gathered: over the cache of a prompt, read back the latents and run the prefill kernel on them.
        pools: how many caches its decode kernel attends to at once.
    """

    def __init__(
        self,
        name: str,
        prefill: PrefillOf,
        decode: DecodeOf,
        reason: Callable[[], str | None],
        distribution: str,
        gathered: bool = False,
        pools: int = 1,
    ) -> None:
        self.name = f"gather_kv + {name}" if gathered else name
        self.stages = ("attention_prefill_paged",) if gathered else STAGES
        self.distributions = (distribution,)
        self._prefill, self._decode, self._reason, self._gathered, self._pools = prefill, decode, reason, gathered, pools

    def available(self) -> str | None:
        return self._reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case.stage

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        heads = case["heads"]
        if not serves(case) or (self._gathered and case["head_dim"] != _V32_CHANNELS):
            return None
        if "extra_k" in dict(case.shape) and self._pools < 2:
            return None
        return Prepared(label(self.name, heads), self._run(case, inputs), lambda results: {"out": results[0][..., :heads, :]})

    def _run(self, case: BenchCase, inputs: Inputs) -> Run:
        if case.stage != "attention_prefill":
            return through_latents(inputs, self._prefill) if self._gathered else over_cache(case, inputs, self._decode)
        q, indices = padded(inputs["q"]), inputs["indices"]
        attend = self._prefill(inputs["kv"], inputs["sm_scale"])
        return lambda: attend(q, indices)


PEERS = tuple(FlashMlaPeer("FlashMLA", prefill_of, decode_of, reason, "sglang-kernel", gathered) for gathered in (False, True))
