"""SGLang's second top-k, compiled at run time: clusters share a row, after a plan that its engine makes once per step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .fast_topk import Choose
from .libraries import imported, needs_gpu

MODULE = "sglang.kernels.ops.attention.dsv4.topk"
FILE = "sglang/kernels/ops/attention/dsv4/topk.py"
TOPK = 2048
"""At most so many."""
BUILD_KEY = "topk_v2"
"""It compiles once, whatever the case."""
FEW_ROWS = 128
"""Selections of so many rows at most are a decode step's, which no engine runs without a plan."""


def reason() -> str | None:
    """Why it cannot be used here."""
    found = needs_gpu(90) or imported(MODULE)
    return found if isinstance(found, str) else None


def serves(case: BenchCase) -> bool:
    """Whether it chooses so many; rows must begin at 16 bytes."""
    return case["k"] <= TOPK and case["context"] % 4 == 0


def planned(lengths: Tensor, topk: int, table: Tensor | None = None, page: int = 1) -> Choose:
    """Chooses after a plan made beforehand: tokens, or slots where there is a page table for every row."""
    library: Any = imported(MODULE)
    plan, chosen = library.plan_topk_v2(lengths), chosen_like(lengths, topk)
    select = library.topk_transform_paged_v2

    def choose(logits: Tensor) -> Tensor:
        select(logits, lengths, table, chosen, page, plan)
        return chosen

    return choose


def ragged(starts: Tensor, ends: Tensor, topk: int) -> Choose:
    """Chooses the tokens of the rows' windows without a plan, as its engine does for a prompt."""
    library: Any = imported(MODULE)
    lengths, chosen = ends - starts, chosen_like(ends, topk)
    select = library.topk_transform_ragged_v2

    def choose(logits: Tensor) -> Tensor:
        select(logits, lengths, out_offsets=starts, out_indices=chosen, row_starts=starts)
        return chosen

    return choose


def tokens_of(starts: Tensor, ends: Tensor) -> Choose:
    """Chooses the tokens of the highest logits in the rows' windows."""
    return ragged(starts, ends, TOPK)


def slots_of(lengths: Tensor, page_table: Tensor, page: int) -> Choose:
    """Chooses the slots of the highest logits, by the page table."""
    rows = lengths.flatten()
    table = page_table.repeat_interleave(len(rows) // len(page_table), dim=0) if len(page_table) else page_table
    return planned(rows, TOPK, table, page)


def chosen_like(rows: Tensor, topk: int) -> Tensor:
    """Where the choice for so many rows is written."""
    return torch.empty(len(rows), topk, dtype=torch.int32, device=rows.device)


class TopkV2(Peer):
    """Its selection, with a plan or as for a prompt."""

    stages = ("select",)
    distributions = ("sglang",)
    files = {"sglang": FILE}  # noqa: RUF012
    deterministic = False
    ordered = False

    def __init__(self, name: str, with_plan: bool) -> None:
        self.name = name
        self._with_plan = with_plan

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return BUILD_KEY

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not serves(case) or (case["rows"] <= FEW_ROWS and not self._with_plan):
            return None
        scores, starts, ends, topk = inputs["scores"], inputs["starts"], inputs["ends"], case["k"]
        choose = planned(ends, topk) if self._with_plan else ragged(starts, ends, topk)
        return Prepared(self.name, lambda: choose(scores), lambda chosen: {"chosen": chosen})


PEERS = (TopkV2("SGLang topk_v2", True), TopkV2("SGLang topk_v2 (prompt)", False))
