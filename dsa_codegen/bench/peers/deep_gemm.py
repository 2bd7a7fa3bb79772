"""DeepGEMM's indexer logits, prefill and paged decode, as sgl-deep-gemm ships it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import imported, needs_gpu

HEADS = (32, 64)
NEXT_N = (1, 2)
PAGE = 64


def reason() -> str | None:
    """Why it cannot be used here."""
    found = needs_gpu(90) or imported("deep_gemm")
    return found if isinstance(found, str) else None


def library() -> Any:
    """The module, told to overlap its launches (programmatic dependent launch), which is off by default and faster."""
    found: Any = imported("deep_gemm")
    found.set_pdl(True)
    return found


def logits_of(k: Tensor, k_scale: Tensor, starts: Tensor, ends: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The prefill logits of queries and weights, columns outside the windows left as they are."""
    score = library().fp8_mqa_logits
    keys = k, k_scale
    return lambda q, weights: as_tensor(score(q, keys, weights, starts, ends, clean_logits=False))


def paged_logits_of(cache: Tensor, lengths: Tensor, table: Tensor, context: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The decode logits of queries and weights; the schedule is made beforehand."""
    deep_gemm = library()
    sms = torch.cuda.get_device_properties(cache.device).multi_processor_count
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, sms)
    score = deep_gemm.fp8_paged_mqa_logits
    return lambda q, weights: as_tensor(score(q, cache, weights, lengths, table, schedule, context, clean_logits=False))


def flattened(case: BenchCase, inputs: Inputs) -> tuple[Tensor, ...]:
    """q, weights, lengths and page table, where it does not serve next_n: every query is a sequence of its own."""
    q, lengths, table = inputs["q"], inputs["lengths"], inputs["page_table"]
    if case["next_n"] in NEXT_N:
        return q, inputs["weights"], lengths, table
    table = table.repeat_interleave(case["next_n"], dim=0)
    return q.flatten(0, 1).unsqueeze(1), inputs["weights"], lengths.reshape(-1, 1), table


def serves(case: BenchCase) -> bool:
    """Whether its kernels have the case's heads and page."""
    return case["heads"] in HEADS and dict(case.shape).get("page", PAGE) == PAGE


def build_key(case: BenchCase) -> Hashable | None:
    """Its kernels are compiled for these."""
    shape = dict(case.shape)
    if "batch" not in shape:
        return "prefill", shape["heads"], shape["head_dim"]
    batch, next_n = shape["batch"], shape["next_n"]
    if next_n not in NEXT_N:
        batch, next_n = batch * next_n, 1
    return "decode", shape["heads"], shape["head_dim"], next_n, -(-batch // 32)


def as_tensor(result: Any) -> Tensor:
    """What its bindings return, as torch's tensor."""
    return result if isinstance(result, Tensor) else torch.from_dlpack(result)


class DeepGemm(Peer):
    """See the module's first lines."""

    name = "DeepGEMM"
    stages = ("indexer_prefill", "indexer_decode")
    distributions = ("sgl-deep-gemm",)

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return build_key(case) if serves(case) else None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not serves(case):
            return None
        context = case["context"]
        if case.stage == "indexer_prefill":
            name, q, weights = self.name, inputs["q"], inputs["weights"]
            score = logits_of(inputs["k"], inputs["k_scale"], inputs["starts"], inputs["ends"])
        else:
            q, weights, lengths, table = flattened(case, inputs)
            score = paged_logits_of(inputs["cache"], lengths, table, context)
            name = self.name if case["next_n"] in NEXT_N else f"{self.name} (queries as sequences)"
        return Prepared(name, lambda: score(q, weights), lambda logits: {"logits": logits[:, :context]})


PEERS = (DeepGemm(),)
