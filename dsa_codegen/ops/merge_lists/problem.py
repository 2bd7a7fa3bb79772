"""Lists of candidates that ascend, one of each part of a sequence -> one list in the order of tokens, for ``select``.

A selection takes the lowest of equal scores, so that among candidates that lie in the order of their tokens it chooses what it
would among all scores. Nothing is sorted: where a candidate comes to lie is counted in the other lists by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...problem import checks, compare
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import NO_CACHE, Model
from ...problem.values import Sizes, Spec
from ..candidates.problem import NO_TOKEN

MOST_PARTS = 128


@dataclass(frozen=True)
class MergeListsSpec(Spec):
    """What changes the code."""

    topk: int
    """Entries of each part's list."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("topk", 1, 8192)


@dataclass(frozen=True)
class MergeListsSizes(Sizes):
    """What varies from call to call."""

    rows: int
    parts: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (133,)}


class MergeListsProblem(Problem[MergeListsSpec, MergeListsSizes]):
    """See the module's first lines."""

    name = "merge_lists"
    summary = "Candidates of several parts of a sequence, each list ascending, as one list in the order of tokens."
    function = "merge_candidates"
    schema = "(Tensor candidates) -> (Tensor, Tensor, Tensor)"
    spec_type = MergeListsSpec
    sizes_type = MergeListsSizes

    def specs_of(self, model: Model) -> Sequence[MergeListsSpec]:
        return () if model.kv_layout == NO_CACHE else (MergeListsSpec(model.topk),)

    def bind(self, *args: Any) -> tuple[MergeListsSpec, MergeListsSizes, Inputs]:
        candidates = checks.tensor("candidates", args[0], (None, None, 2, None), torch.int32)
        parts, rows, _, topk = candidates.shape
        if not 1 <= parts <= MOST_PARTS:
            raise InputError("candidates", f"{parts} parts", f"1 to {MOST_PARTS}")
        return MergeListsSpec(topk), MergeListsSizes(rows, parts), {"candidates": candidates}

    def inputs(self, spec: MergeListsSpec, case: Case[MergeListsSizes], draw: Draw) -> Inputs:
        rows, parts = case.sizes.rows, case.sizes.parts
        tokens = 2 * parts * spec.topk
        owner = draw.integers(0, parts, rows, tokens)
        if case.distribution == "stretches":  # lists one behind the other, some of none
            owner = (torch.arange(tokens, device=draw.device) * (parts + 1) // tokens).clamp(max=parts - 1).expand(rows, -1)
        token = torch.arange(tokens, device=draw.device)
        seen = draw.integers(0, tokens + 1, rows, 1)
        lists = []
        for part in range(parts):
            own = torch.where((owner == part) & (token < seen) & (draw.uniform(rows, tokens) < 0.7), token, NO_TOKEN)
            own = own.sort(1).values[:, : spec.topk]
            scores = draw.normal(rows, spec.topk).masked_fill(own == NO_TOKEN, -torch.inf)
            lists.append(torch.stack([own.int(), scores.view(torch.int32)], 1))
        return {"candidates": torch.stack(lists)}

    def reference(self, spec: MergeListsSpec, inputs: Inputs) -> Outputs:
        token, bits = inputs["candidates"].permute(2, 1, 0, 3).flatten(2)
        tokens, order = token.sort(dim=1, stable=True)
        ranked = bits.gather(1, order).view(torch.float32)
        return {"ranked": ranked, "tokens": tokens, "ends": (tokens != NO_TOKEN).sum(1, dtype=torch.int32)}

    def allocate(self, spec: MergeListsSpec, inputs: Inputs) -> Outputs:
        candidates = inputs["candidates"]
        parts, rows = candidates.shape[:2]
        ranked = candidates.new_empty(rows, parts * spec.topk, dtype=torch.float32)
        return {"ranked": ranked, "tokens": torch.empty_like(ranked, dtype=torch.int32), "ends": candidates.new_empty(rows)}

    def check(self, spec: MergeListsSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        """Behind a row's last candidate there is anything: who reads the list has its end."""
        ends = reference["ends"]
        within = torch.arange(reference["tokens"].shape[1], device=ends.device) < ends[:, None]
        bits = [each["ranked"].view(torch.int32)[within] for each in (outputs, reference)]
        return compare.worst(
            compare.equal("ends", outputs["ends"], ends),
            compare.equal("tokens", outputs["tokens"][within], reference["tokens"][within]),
            compare.equal("ranked", *bits),
        )

    def cost(self, spec: MergeListsSpec, case: Case[MergeListsSizes]) -> Cost:
        entries = case.sizes.rows * case.sizes.parts * spec.topk
        return Cost(12.0 * entries * (case.sizes.parts - 1), 16 * entries, "fp32")

    def cases(self, spec: MergeListsSpec) -> Sequence[Case[MergeListsSizes]]:
        plain = [Case(MergeListsSizes(rows, parts)) for rows, parts in ((4, 2), (2, 3), (3, 1), (0, 2))]
        return [*plain, Case(MergeListsSizes(3, 4), "stretches")]

    def options(self, spec: MergeListsSpec) -> Sequence[MergeListsSpec]:
        return (spec, replace(spec, topk=spec.topk + 3))

    def workloads(self, spec: MergeListsSpec) -> Sequence[Case[MergeListsSizes]]:
        return [Case(MergeListsSizes(rows, parts)) for rows, parts in ((64, 2), (256, 2))]
