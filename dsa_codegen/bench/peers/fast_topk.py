"""SGLang's top-k, made for DeepSeek-V3.2: 2048 of the fp32 scores of a row, in any order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import loaded, needs_gpu

TOPK = 2048
LIBRARY = "sm90/common_ops.abi3.so"
BUILD_KEY = ""
"""It compiles nothing."""

Choose = Callable[[Tensor], Tensor]
"""Logits to what was chosen of them."""


def reason() -> str | None:
    """Why it cannot be used here."""
    return needs_gpu(90) or loaded("sgl_kernel", LIBRARY, "sglang-kernel")


def chosen_like(rows: Tensor) -> Tensor:
    """Where the choice for so many rows is written."""
    return torch.empty(len(rows), TOPK, dtype=torch.int32, device=rows.device)


def serves(case: BenchCase) -> bool:
    """Whether it chooses so many."""
    return case["k"] == TOPK


def tokens_of(starts: Tensor, ends: Tensor) -> Choose:
    """Chooses the tokens of the highest logits in the rows' windows."""
    chosen, lengths = chosen_like(ends), ends - starts
    select = torch.ops.sgl_kernel.fast_topk.default

    def choose(logits: Tensor) -> Tensor:
        select(logits, chosen, lengths, starts)
        return chosen

    return choose


def slots_of(lengths: Tensor, page_table: Tensor, page: int) -> Choose:
    """Chooses the slots of the highest logits; for them its users keep a table of slots beside the page table."""
    rows, requests = lengths.flatten(), len(page_table)
    slots = (page_table[:, :, None] * page + torch.arange(page, device=rows.device)).flatten(1).int()
    slots = slots.repeat_interleave(len(rows) // requests, dim=0)
    chosen, ends = chosen_like(rows), torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    select = torch.ops.sgl_kernel.fast_topk_transform_fused.default

    def choose(logits: Tensor) -> Tensor:
        select(logits, rows, chosen, slots, ends, None)
        return chosen

    return choose


class FastTopk(Peer):
    """See the module's first lines."""

    name = "fast_topk"
    stages = ("select",)
    distributions = ("sglang-kernel",)
    deterministic = False
    ordered = False

    def available(self) -> str | None:
        return reason()

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not serves(case):
            return None
        scores, ends = inputs["scores"], inputs["ends"]
        chosen, select = chosen_like(scores), torch.ops.sgl_kernel.fast_topk.default
        return Prepared("fast_topk", lambda: select(scores, chosen, ends, None), lambda _: {"chosen": chosen})


PEERS = (FastTopk(),)
