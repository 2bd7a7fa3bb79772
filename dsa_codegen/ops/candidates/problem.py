"""Tokens that were chosen in a part of a sequence -> candidates: their numbers in the sequence, and their scores.

Where a cache is sharded by position, a rank selects among its own tokens, and others merge what it found with theirs. Numbers
and scores lie in one message: between two launches of a decode step little is as long as a launch itself.
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
from ..logits import LOGITS

NO_TOKEN = 2**31 - 1
"""Stands for none, and sorts behind every token."""


@dataclass(frozen=True)
class CandidatesSpec(Spec):
    """What changes the code."""

    topk: int
    logits: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("topk", 1, 8192)
        self.require_in("logits", LOGITS)


@dataclass(frozen=True)
class CandidatesSizes(Sizes):
    """What varies from call to call."""

    rows: int
    columns: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (133,)}


class CandidatesProblem(Problem[CandidatesSpec, CandidatesSizes]):
    """See the module's first lines."""

    name = "candidates"
    summary = "Tokens chosen in a part of a sequence to their numbers in the sequence with their scores, in one message."
    function = "candidates_of"
    schema = "(Tensor logits, Tensor tokens, int offset=0, int stride=1, int block=1) -> Tensor"
    spec_type = CandidatesSpec
    sizes_type = CandidatesSizes
    minor = frozenset({"logits"})

    def specs_of(self, model: Model) -> Sequence[CandidatesSpec]:
        return () if model.kv_layout == NO_CACHE else (CandidatesSpec(model.topk),)

    def bind(self, *args: Any) -> tuple[CandidatesSpec, CandidatesSizes, Inputs]:
        logits, tokens, offset, stride, block = args
        tokens = checks.tensor("tokens", tokens, (None, None), torch.int32)
        logits = checks.rows("logits", logits, (tokens.shape[0], None), tuple(LOGITS.values()), like=tokens, whole=False)
        for name, value, lowest in (("offset", offset, 0), ("block", block, 1), ("stride", stride, block)):
            if not lowest <= value <= NO_TOKEN:
                raise InputError(name, value, f"{lowest} to {NO_TOKEN}")
        named = next(name for name, dtype in LOGITS.items() if dtype == logits.dtype)
        held = {"offset": offset, "stride": stride, "block": block}
        sizes = CandidatesSizes(*logits.shape)
        return CandidatesSpec(tokens.shape[1], named), sizes, {"logits": logits, "tokens": tokens, **held}

    def inputs(self, spec: CandidatesSpec, case: Case[CandidatesSizes], draw: Draw) -> Inputs:
        rows, columns = case.sizes.rows, case.sizes.columns
        held = {"offset": 8, "stride": 24, "block": 8} if case.distribution == "sharded" else {}
        logits = draw.normal(rows, columns).to(LOGITS[spec.logits])
        # Not as a selection would give them: with none between others, and in any order.
        tokens = draw.integers(-columns // 4 - 1, columns + columns // 4 + 1, rows, spec.topk).clamp(min=-1).int()
        tokens = tokens if columns else tokens.fill_(-1)
        return {"logits": logits, "tokens": tokens, "offset": 0, "stride": 1, "block": 1, **held}

    def reference(self, spec: CandidatesSpec, inputs: Inputs) -> Outputs:
        logits, token = inputs["logits"], inputs["tokens"].long()
        none = (token < 0) | (token >= logits.shape[1])
        if logits.shape[1]:
            score = logits.gather(1, token.masked_fill(none, 0)).float().masked_fill(none, -torch.inf)
        else:
            score = torch.full_like(token, -torch.inf, dtype=torch.float32)
        whole = token // inputs["block"] * inputs["stride"] + token % inputs["block"] + inputs["offset"]
        return {"out": torch.stack([whole.masked_fill(none, NO_TOKEN).int(), score.view(torch.int32)], 1)}

    def allocate(self, spec: CandidatesSpec, inputs: Inputs) -> Outputs:
        tokens = inputs["tokens"]
        return {"out": tokens.new_empty(tokens.shape[0], 2, spec.topk)}

    def check(self, spec: CandidatesSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.equal("out", outputs["out"], reference["out"])

    def cost(self, spec: CandidatesSpec, case: Case[CandidatesSizes]) -> Cost:
        entries = case.sizes.rows * spec.topk
        return Cost(4.0 * entries, 16 * entries, "fp32")

    def cases(self, spec: CandidatesSpec) -> Sequence[Case[CandidatesSizes]]:
        plain = [Case(CandidatesSizes(rows, columns)) for rows, columns in ((4, 300), (3, 5), (1, 0), (0, 9))]
        return [*plain, Case(CandidatesSizes(5, 130), "sharded")]

    def options(self, spec: CandidatesSpec) -> Sequence[CandidatesSpec]:
        return (spec, replace(spec, logits="bf16"), replace(spec, topk=spec.topk + 3))

    def workloads(self, spec: CandidatesSpec) -> Sequence[Case[CandidatesSizes]]:
        return [Case(CandidatesSizes(rows, 32768)) for rows in (64, 256)]
