"""The best kernels of today one after another, as SGLang chains them: DeepGEMM, fast_topk and FlashMLA."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ... import functions
from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared, Run
from . import deep_gemm, fast_topk, flashmla
from .base import Peer

_NAME = "DeepGEMM + fast_topk"


def _tokens_of(starts: Tensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
    """The tokens of the highest logits in the rows' windows."""
    chosen, lengths = fast_topk.chosen_like(ends), ends - starts
    select = torch.ops.sgl_kernel.fast_topk.default

    def choose(logits: Tensor) -> Tensor:
        select(logits, chosen, lengths, starts)
        return chosen

    return choose


def _slots_of(lengths: Tensor, page_table: Tensor, page: int) -> Callable[[Tensor], Tensor]:
    """The slots of the highest logits; for them its users keep a table of slots beside the page table."""
    rows, requests = lengths.flatten(), len(page_table)
    slots = (page_table[:, :, None] * page + torch.arange(page, device=rows.device)).flatten(1).int()
    slots = slots.repeat_interleave(len(rows) // requests, dim=0)
    chosen, ends = fast_topk.chosen_like(rows), torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    select = torch.ops.sgl_kernel.fast_topk_transform_fused.default

    def choose(logits: Tensor) -> Tensor:
        select(logits, rows, chosen, slots, ends, None)
        return chosen

    return choose


class IndexSelect(Peer):
    """Logits in memory, then their highest."""

    name = _NAME
    stages = ("index_select_prefill", "index_select_decode")
    distributions = ("sgl-deep-gemm", "sglang-kernel")

    def available(self) -> str | None:
        return deep_gemm.reason() or fast_topk.reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return deep_gemm.build_key(case) if deep_gemm.serves(case) else None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not deep_gemm.serves(case) or case["k"] != fast_topk.TOPK:
            return None
        if case.stage == "index_select_prefill":
            q, weights, starts, ends = (inputs[name] for name in ("q", "weights", "starts", "ends"))
            score, choose = deep_gemm.logits_of(inputs["k"], inputs["k_scale"], starts, ends), _tokens_of(starts, ends)
        else:
            q, weights, lengths, table = deep_gemm.flattened(case, inputs)
            score = deep_gemm.paged_logits_of(inputs["cache"], lengths, table, case["context"])
            choose = _slots_of(lengths, table, case["page"])
        return Prepared(self.name, lambda: choose(score(q, weights)), lambda chosen: {"chosen": chosen})


class WholeLayer(Peer):
    """The three stages; the indexer's queries are quantised by this package's kernel, as they are for ours."""

    name = f"{_NAME} + FlashMLA"
    stages = ("layer_prefill", "layer_decode")
    distributions = ("sgl-deep-gemm", "sglang-kernel")

    def available(self) -> str | None:
        return deep_gemm.reason() or fast_topk.reason() or flashmla.reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case.stage

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case["k"] != fast_topk.TOPK or case["heads"] not in flashmla.HEADS:
            return None
        run = _prefill(inputs) if case.stage == "layer_prefill" else _decode(case, inputs)
        return Prepared(self.name, run, lambda results: {"out": results[0], "chosen": results[1]})


def _prefill(inputs: Inputs) -> Run:
    q, index_q, index_weights = inputs["q"], inputs["index_q"], inputs["index_weights"]
    score = deep_gemm.logits_of(inputs["k"], inputs["k_scale"], inputs["starts"], inputs["ends"])
    choose = _tokens_of(inputs["starts"], inputs["ends"])
    attend = flashmla.prefill_of(inputs["kv"], inputs["sm_scale"])

    def run() -> tuple[Tensor, Tensor]:
        chosen = choose(score(*functions.quantize_index_q(index_q, index_weights)))
        return attend(q, chosen[:, None])[0], chosen

    return run


def _decode(case: BenchCase, inputs: Inputs) -> Run:
    q, index_q, lengths, table = (inputs[name] for name in ("q", "index_q", "lengths", "page_table"))
    flat_q, flat_weights = index_q.flatten(0, 1), inputs["index_weights"].flatten(0, 1)
    score = deep_gemm.paged_logits_of(inputs["cache"], lengths, table, case["context"])
    choose = _slots_of(lengths, table, case["page"])
    attend = flashmla.decode_of(inputs["kv_cache"], q.shape, case["context"], case["k"], inputs["sm_scale"])

    def run() -> tuple[Tensor, Tensor]:
        quantised, weights = functions.quantize_index_q(flat_q, flat_weights)
        chosen = choose(score(quantised.view(index_q.shape), weights)).view(*lengths.shape, -1)
        return attend(q, chosen)[0], chosen

    return run


PEERS = (IndexSelect(), WholeLayer())
