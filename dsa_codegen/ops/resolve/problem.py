"""Chosen tokens -> the slots of those at hand, and the tokens that are missing: for caches that hold a part of a sequence.

Where a KV cache lies in the host's memory and a small buffer of rows on the GPU (SGLang's HiSparse), a page table states which
tokens are resident in which page of the buffer; where a cache is sharded by position, which of the sequence's tokens a rank
holds at all is arithmetic (``distributed.Shard``). Both lists keep the order of the choice, so that nothing depends on timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, compare
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import NO_CACHE, Model
from ...problem.values import Sizes, Spec

MOST = 2**31 - 1
"""Tokens are int32."""


@dataclass(frozen=True)
class ResolveSpec(Spec):
    """What changes the code."""

    topk: int
    page: int = 1
    misses: bool = True
    """Whether the missing are listed too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("topk", 1, 8192)
        self.require_range("page", 1, 1024)


@dataclass(frozen=True)
class ResolveSizes(Sizes):
    """What varies from call to call."""

    rows: int
    pages: int
    """Of a request, in the table."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (133,)}


class ResolveProblem(Problem[ResolveSpec, ResolveSizes]):
    """See the module's first lines."""

    name = "resolve"
    summary = "Chosen tokens to the slots of those at hand, in front, and to a list of those that are missing."
    function = "resolve"
    schema = (
        "(Tensor chosen, Tensor page_table, int page=1, bool misses=True, int offset=0, int stride=1, int block=1, "
        "int tokens=2147483647) -> Tensor[]"
    )
    spec_type = ResolveSpec
    sizes_type = ResolveSizes
    minor = frozenset({"page", "misses"})

    def specs_of(self, model: Model) -> Sequence[ResolveSpec]:
        return () if model.kv_layout == NO_CACHE else (ResolveSpec(model.topk), ResolveSpec(model.topk, model.page, False))

    def bind(self, *args: Any) -> tuple[ResolveSpec, ResolveSizes, Inputs]:
        chosen, page_table, page, misses, offset, stride, block, tokens = args
        chosen = checks.tensor("chosen", chosen, (None, None), torch.int32)
        page_table = checks.tensor("page_table", page_table, (None, None), torch.int32, like=chosen, inner_contiguous=True)
        rows, requests = chosen.shape[0], page_table.shape[0]  # `len` would tie a trace to this number
        if rows % max(requests, 1) or (rows and not requests):
            raise InputError("page_table", f"{requests} rows", f"a number that divides the {rows} of chosen")
        held = {"offset": (offset, 0), "block": (block, 1), "stride": (stride, block), "tokens": (tokens, 0)}
        for name, (value, lowest) in held.items():
            if not lowest <= value <= MOST:
                raise InputError(name, value, f"{lowest} to {MOST}")
        spec = ResolveSpec(chosen.shape[1], page, misses)
        inputs = {"chosen": chosen, "page_table": page_table}
        return spec, ResolveSizes(rows, page_table.shape[1]), {**inputs, **{name: value for name, (value, _) in held.items()}}

    def inputs(self, spec: ResolveSpec, case: Case[ResolveSizes], draw: Draw) -> Inputs:
        rows, pages = case.sizes.rows, case.sizes.pages
        sharded = case.distribution == "sharded"
        held = {"offset": 8, "stride": 24, "block": 8, "tokens": 3 * pages * spec.page // 4} if sharded else {}
        known = pages * spec.page * (3 if sharded else 1) + 20  # some of the chosen are of no page
        chosen = draw.integers(-known // 8, known, rows, spec.topk)  # a kernel need not see that they ascend
        requests = rows // 2 if rows % 2 == 0 else rows
        blocks = draw.integers(-requests * pages - 1, 2 * requests * pages + 1, requests, pages)
        return {
            "chosen": chosen.clamp(min=-1),
            "page_table": blocks.clamp(min=-1),
            **{"offset": 0, "stride": 1, "block": 1, "tokens": MOST, **held},
        }

    def reference(self, spec: ResolveSpec, inputs: Inputs) -> Outputs:
        chosen, table = inputs["chosen"].long(), inputs["page_table"].long()
        place = chosen - inputs["offset"]
        local = place // inputs["stride"] * inputs["block"] + place % inputs["stride"]
        own = (chosen >= 0) & (place >= 0) & (place % inputs["stride"] < inputs["block"]) & (local < inputs["tokens"])
        number = local.clamp(min=0) // spec.page
        listed = own & (number < table.shape[1])
        if len(table) and table.shape[1]:
            of_rows = table.repeat_interleave(len(chosen) // len(table), 0)
            found = of_rows.gather(1, number.clamp(max=table.shape[1] - 1)).masked_fill(~listed, -1)
        else:
            found = torch.full_like(chosen, -1)
        here, missing = own & (found >= 0), own & (found < 0)
        slots, counts = _in_front(found * spec.page + local.clamp(min=0) % spec.page, here)
        if not spec.misses:
            return {"slots": slots, "counts": counts}
        misses, missed = _in_front(chosen, missing)
        return {"slots": slots, "counts": counts, "misses": misses, "missed": missed}

    def allocate(self, spec: ResolveSpec, inputs: Inputs) -> Outputs:
        chosen = inputs["chosen"]
        counts = chosen.new_empty(chosen.shape[0])
        outputs = {"slots": torch.empty_like(chosen), "counts": counts}
        return {**outputs, "misses": torch.empty_like(chosen), "missed": torch.empty_like(counts)} if spec.misses else outputs

    def check(self, spec: ResolveSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(*(compare.equal(name, outputs[name], value) for name, value in reference.items()))

    def cost(self, spec: ResolveSpec, case: Case[ResolveSizes]) -> Cost:
        entries = case.sizes.rows * spec.topk
        return Cost(8.0 * entries, 4 * entries * (4 if spec.misses else 3), "fp32")

    def cases(self, spec: ResolveSpec) -> Sequence[Case[ResolveSizes]]:
        plain = [Case(ResolveSizes(rows, pages)) for rows, pages in ((4, 70), (3, 9), (1, 0), (0, 5))]
        return [*plain, Case(ResolveSizes(6, 40), "sharded")]

    def options(self, spec: ResolveSpec) -> Sequence[ResolveSpec]:
        return (spec, replace(spec, misses=not spec.misses), replace(spec, page=64), replace(spec, topk=spec.topk + 3, page=3))

    def workloads(self, spec: ResolveSpec) -> Sequence[Case[ResolveSizes]]:
        return [Case(ResolveSizes(rows, 65536 // spec.page)) for rows in (64, 256)]


def _in_front(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(int32 [rows, topk], the wanted in their order, -1 behind them; int32 [rows], how many)."""
    order = (~wanted).int().argsort(dim=1, stable=True)
    return values.masked_fill(~wanted, -1).gather(1, order).int(), wanted.sum(1, dtype=torch.int32)
