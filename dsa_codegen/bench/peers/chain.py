"""The best kernels of today one after another, as SGLang chains them: DeepGEMM, one of its two top-ks, and FlashMLA."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor

from ... import functions
from ...problem.op import Inputs
from .. import engines
from ..cases import BenchCase
from ..stage import Prepared, Run
from . import deep_gemm, fast_topk, flashmla, sgl_flash_mla, topk_v2
from .base import Peer


class Chooser(Protocol):
    """What a module of a selection gives to a chain."""

    BUILD_KEY: str

    def reason(self) -> str | None: ...
    def serves(self, case: BenchCase) -> bool: ...
    def tokens_of(self, starts: Tensor, ends: Tensor) -> fast_topk.Choose: ...
    def slots_of(self, lengths: Tensor, page_table: Tensor, page: int) -> fast_topk.Choose: ...


class Attention(Protocol):
    """What a module of a copy of FlashMLA gives to a chain."""

    def reason(self) -> str | None: ...
    def prefill_of(self, kv: Tensor, sm_scale: float) -> flashmla.Attend: ...
    def decode_of(self, cache: Tensor, shape: torch.Size, context: int, topk: int, sm_scale: float) -> flashmla.Attend: ...


class IndexSelect(Peer):
    """Logits in memory, then their highest."""

    stages = ("index_select_prefill", "index_select_decode")
    deterministic = False
    ordered = False
    files = {"sglang": topk_v2.FILE}  # noqa: RUF012

    def __init__(self, choice: str, chooser: Chooser, distribution: str) -> None:
        self.name = f"DeepGEMM + {choice}"
        self.distributions = ("sgl-deep-gemm", distribution)
        self._chooser = chooser

    def available(self) -> str | None:
        return deep_gemm.reason() or self._chooser.reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self._chooser.BUILD_KEY or (deep_gemm.build_key(case) if deep_gemm.serves(case) else None)

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not deep_gemm.serves(case) or not self._chooser.serves(case):
            return None
        if case.stage == "index_select_prefill":
            q, weights, starts, ends = (inputs[name] for name in ("q", "weights", "starts", "ends"))
            score = deep_gemm.logits_of(inputs["k"], inputs["k_scale"], starts, ends)
            choose = self._chooser.tokens_of(starts, ends)
        else:
            q, weights, lengths, table = deep_gemm.flattened(case, inputs)
            score = deep_gemm.paged_logits_of(inputs["cache"], lengths, table, case["context"])
            choose = self._chooser.slots_of(lengths, table, case["page"])
        return Prepared(self.name, lambda: choose(score(q, weights)), lambda chosen: {"chosen": chosen})


class WholeLayer(Peer):
    """The three stages; the indexer's queries are quantised by this package's kernel, as they are for ours.

    Of an engine's step also the stores, and in prefill the index keys read back from their pages, by the same kernels as ours.
    """

    stages = ("layer_prefill", "layer_decode", "engine_prefill", "engine_decode")
    deterministic = False
    ordered = False
    files = {"sglang": topk_v2.FILE}  # noqa: RUF012

    def __init__(self, index: IndexSelect, chooser: Chooser, name: str, attention: Attention, distribution: str) -> None:
        self.name = f"{index.name} + {name}"
        self.distributions = tuple(dict.fromkeys((*index.distributions, distribution)))
        self._index, self._chooser, self._attention = index, chooser, attention

    def available(self) -> str | None:
        return self._index.available() or self._attention.reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case.stage

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not self._chooser.serves(case) or case["heads"] > flashmla.HEADS[-1]:
            return None
        run = self._prefill(inputs) if case.stage.endswith("_prefill") else self._decode(case, inputs)
        heads = case["heads"]
        return Prepared(
            flashmla.label(self.name, heads), run, lambda results: {"out": results[0][..., :heads, :], "chosen": results[1]}
        )

    def _prefill(self, inputs: Inputs) -> Run:
        q, index_q, index_weights = flashmla.padded(inputs["q"]), inputs["index_q"], inputs["index_weights"]
        windows = inputs["starts"], inputs["ends"]
        choose, store, keys = self._chooser.tokens_of(*windows), engines.storing(inputs), engines.gathering(inputs)
        attend = self._attention.prefill_of(inputs["kv"], inputs["sm_scale"])

        def run() -> tuple[Tensor, Tensor]:
            quantised = functions.quantize_index_q(index_q, index_weights)
            store()
            chosen = choose(deep_gemm.logits_of(*keys(), *windows)(*quantised))
            return attend(q, chosen[:, None])[0], chosen

        return run

    def _decode(self, case: BenchCase, inputs: Inputs) -> Run:
        q, index_q, lengths, table = flashmla.padded(inputs["q"]), *(inputs[n] for n in ("index_q", "lengths", "page_table"))
        flat_q, flat_weights = index_q.flatten(0, 1), inputs["index_weights"].flatten(0, 1)
        score = deep_gemm.paged_logits_of(inputs["cache"], lengths, table, case["context"])
        choose = self._chooser.slots_of(lengths, table, case["page"])
        attend = self._attention.decode_of(inputs["kv_cache"], q.shape, case["context"], case["k"], inputs["sm_scale"])
        store = engines.storing(inputs)

        def run() -> tuple[Tensor, Tensor]:
            quantised, weights = functions.quantize_index_q(flat_q, flat_weights)
            store()
            chosen = choose(score(quantised.view(index_q.shape), weights)).view(*lengths.shape, -1)
            return attend(q, chosen)[0], chosen

        return run


def _chains() -> tuple[Peer, ...]:
    """The first generation, and the newest of everything."""
    first = IndexSelect("fast_topk", fast_topk, "sglang-kernel")
    newest = IndexSelect("topk_v2", topk_v2, "sglang")
    return (
        first,
        newest,
        WholeLayer(first, fast_topk, "FlashMLA", flashmla, "sglang-kernel"),
        WholeLayer(newest, topk_v2, "sgl-flash-mla", sgl_flash_mla, "sgl-flash-mla"),
    )


PEERS = _chains()
