"""Chosen blocks of tokens -> the tokens, and behind them the row's last tokens that no whole block holds.

Models that pool their indexer's keys (GLM-5.3-Flash: 16 tokens a key) choose blocks; a query attends to every token of a chosen
block, and always to the tail: the tokens behind its last whole block, which have no pooled key yet, ``pool - 1`` at most.
Blocks of a sequence count from its first token: block ``block_starts[t] + i`` holds the tokens ``starts[t] + i · pool`` and the
``pool - 1`` behind it.
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
from ...problem.presets import POOLS, Model
from ...problem.values import Sizes, Spec
from ..select.problem import OUTPUTS


@dataclass(frozen=True)
class ExpandSpec(Spec):
    """What changes the code."""

    blocks: int
    """Entries of a list of blocks."""
    pool: int
    """Tokens of a block."""
    output: str = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("pool", POOLS)
        self.require_range("blocks", 1, 8192 // self.pool)
        self.require_in("output", OUTPUTS)

    @property
    def width(self) -> int:
        """Entries of a list of tokens."""
        return self.blocks * self.pool + self.pool - 1


@dataclass(frozen=True)
class ExpandSizes(Sizes):
    """What varies from call to call."""

    rows: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (133,)}


class ExpandProblem(Problem[ExpandSpec, ExpandSizes]):
    """See the module's first lines."""

    name = "expand"
    summary = "Chosen blocks to their tokens or slots, the tail behind the last whole block, and how many they are."
    function = "expand_blocks"
    schema = (
        "(Tensor chosen, Tensor block_starts, Tensor starts, Tensor ends, int pool, Tensor? page_table=None, "
        "int page=64) -> (Tensor, Tensor)"
    )
    spec_type = ExpandSpec
    sizes_type = ExpandSizes
    minor = frozenset({"output"})

    def specs_of(self, model: Model) -> Sequence[ExpandSpec]:
        return () if model.pool == 1 else (ExpandSpec(model.topk // model.pool, model.pool),)

    def bind(self, *args: Any) -> tuple[ExpandSpec, ExpandSizes, Inputs]:
        chosen, block_starts, starts, ends, pool, page_table, page = args
        chosen = checks.tensor("chosen", chosen, (None, None), torch.int32)
        rows, blocks = chosen.shape
        inputs = {"chosen": chosen, "page_table": page_table, "pool": pool, "page": page}
        for name, value in (("block_starts", block_starts), ("starts", starts), ("ends", ends)):
            inputs[name] = checks.tensor(name, value, (rows,), torch.int32, like=chosen)
        if page_table is not None:
            table = checks.tensor("page_table", page_table, (None, None), torch.int32, like=chosen, inner_contiguous=True)
            requests = table.shape[0]
            if rows % max(requests, 1) or (rows and not requests):
                raise InputError("page_table", f"{requests} rows", f"a row per request, and the {rows} rows of chosen shared")
            if not 1 <= page <= 65536:
                raise InputError("page", page, "1 to 65536")
        spec = ExpandSpec(blocks, pool, "tokens" if page_table is None else "slots")
        return spec, ExpandSizes(rows), inputs

    def inputs(self, spec: ExpandSpec, case: Case[ExpandSizes], draw: Draw) -> Inputs:
        rows, pool = case.sizes.rows, spec.pool
        starts = draw.integers(0, 300, rows)
        seen = draw.integers(-3, 3 * spec.blocks * pool, rows)
        firsts = draw.integers(0, 50, rows)
        ranks = draw.uniform(rows, 3 * spec.blocks).masked_fill(
            torch.arange(3 * spec.blocks, device=draw.device) >= (seen.clamp(min=0) // pool)[:, None], 2.0
        )
        best, block = ranks.sort(dim=1)
        chosen = block[:, : spec.blocks].masked_fill(best[:, : spec.blocks] > 1, 1 << 30).sort(dim=1).values
        chosen = torch.where(chosen == 1 << 30, -1, chosen + firsts[:, None])
        table = None
        if spec.output == "slots":
            requests = rows // 2 if rows % 2 == 0 else rows
            pages = -(-(300 + 3 * spec.blocks * pool) // 64)
            table = draw.integers(-1, 1 << 20, requests, pages)
        bounds = {"block_starts": firsts, "starts": starts, "ends": starts + seen}
        return {"chosen": chosen.int(), **bounds, "pool": pool, "page_table": table, "page": 64}

    def reference(self, spec: ExpandSpec, inputs: Inputs) -> Outputs:
        chosen, pool = inputs["chosen"].long(), spec.pool
        start = inputs["starts"].long().clamp(min=0)[:, None]
        seen = (inputs["ends"].long()[:, None] - start).clamp(min=0)
        whole = seen // pool * pool
        count = (chosen >= 0).sum(1, keepdim=True) * pool
        member = torch.arange(pool, device=chosen.device)
        listed = ((chosen - inputs["block_starts"].long()[:, None])[:, :, None] * pool + member).flatten(1)
        listed = torch.nn.functional.pad(listed, (0, pool - 1))
        entry = torch.arange(spec.width, device=chosen.device)
        token = start + torch.where(entry < count, listed, whole + entry - count)
        total = count + seen - whole
        token = token.masked_fill(entry >= total, -1)
        if spec.output == "slots":
            token = _slots(inputs["page_table"].long(), token, inputs["page"])
        return {"out": token.int(), "lengths": total[:, 0].int()}

    def allocate(self, spec: ExpandSpec, inputs: Inputs) -> Outputs:
        chosen = inputs["chosen"]
        return {"out": chosen.new_empty(chosen.shape[0], spec.width), "lengths": chosen.new_empty(chosen.shape[0])}

    def check(self, spec: ExpandSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(*(compare.equal(name, outputs[name], value) for name, value in reference.items()))

    def cost(self, spec: ExpandSpec, case: Case[ExpandSizes]) -> Cost:
        return Cost(8.0 * case.sizes.rows * spec.width, 4 * case.sizes.rows * (spec.width + spec.blocks + 4), "fp32")

    def cases(self, spec: ExpandSpec) -> Sequence[Case[ExpandSizes]]:
        return [Case(ExpandSizes(rows)) for rows in (6, 3, 1, 0)]

    def long_cases(self, spec: ExpandSpec) -> Sequence[Case[ExpandSizes]]:
        return [Case(ExpandSizes(500))]

    def options(self, spec: ExpandSpec) -> Sequence[ExpandSpec]:
        odd = replace(spec, blocks=spec.blocks + 3, output="slots")
        return (spec, replace(spec, output="slots"), replace(spec, pool=1), odd)

    def workloads(self, spec: ExpandSpec) -> Sequence[Case[ExpandSizes]]:
        return [Case(ExpandSizes(rows)) for rows in (64, 4096)]


def _slots(table: Tensor, token: Tensor, page: int) -> Tensor:
    """The slots that hold the tokens, -1 where there is none or the table names no page."""
    if not token.numel() or not table.shape[1]:
        return torch.full_like(token, -1)
    number = token.clamp(min=0) // page
    of_rows = table.repeat_interleave(len(token) // len(table), 0)
    block = of_rows.gather(1, number.clamp(max=table.shape[1] - 1)).masked_fill(number >= table.shape[1], -1)
    return torch.where((token < 0) | (block < 0), -1, block * page + token % page)
