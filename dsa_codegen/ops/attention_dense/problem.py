"""Dense MLA over windows, with lse: what the indexer's warm-up learns from, and what sparse attention is compared with.

``out[h] = Σ_s softmax(sm_scale · q[h] · kv[s]) · kv[s, :d_v]`` over the tokens s of each query's window [start, end). Windows
state causal batches, packed sequences and a rank's part of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...problem import channels, checks
from ...problem.channels import D_V
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import Model
from ...problem.values import Spec
from ..attended import attended, check_scale, compare_attended
from ..attention.problem import AttentionSizes
from . import formulas


@dataclass(frozen=True)
class AttentionDenseSpec(Spec):
    """What changes the code."""

    heads: int
    d_qk: int
    sink: bool = False
    d_v: int = D_V
    """Channels of a token, the first ones, that are also its value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        channels.require(self)


@dataclass(frozen=True)
class AttentionDenseSizes(AttentionSizes):
    """What varies from call to call."""


class AttentionDenseProblem(Problem[AttentionDenseSpec, AttentionDenseSizes]):
    """See the module's first lines."""

    name = "attention_dense"
    summary = "Dense MLA with lse: every query attends to all tokens of its window, all heads sharing one latent vector."
    function = "dense_attention"
    schema = (
        "(Tensor q, Tensor kv, float sm_scale, Tensor starts, Tensor ends, Tensor? sink=None, int d_v=512) -> (Tensor, Tensor)"
    )
    spec_type = AttentionDenseSpec
    sizes_type = AttentionDenseSizes
    minor = frozenset({"sink"})
    training: ClassVar[bool] = True

    def specs_of(self, model: Model) -> Sequence[AttentionDenseSpec]:
        return (AttentionDenseSpec(model.heads, model.d_qk, model.attn_sink, model.d_v),)

    def bind(self, *args: Any) -> tuple[AttentionDenseSpec, AttentionDenseSizes, Inputs]:
        q, kv, sm_scale, starts, ends, sink, d_v = args
        q = checks.tensor("q", q, (None, None, None), checks.floating(q))
        queries, heads, d_qk = q.shape
        channels.check("q", d_qk, d_v)
        kv = checks.tensor("kv", kv, (None, 1, d_qk), q.dtype, like=q)
        starts = checks.tensor("starts", starts, (queries,), torch.int32, like=q)
        ends = checks.tensor("ends", ends, (queries,), torch.int32, like=q)
        if sink is not None:
            sink = checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        check_scale(sm_scale)
        inputs = {"q": q, "kv": kv, "sm_scale": sm_scale, "starts": starts, "ends": ends, "sink": sink}
        return AttentionDenseSpec(heads, d_qk, sink is not None, d_v), AttentionDenseSizes(queries, kv.shape[0]), inputs

    def inputs(self, spec: AttentionDenseSpec, case: Case[AttentionDenseSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        starts = draw.integers(-2, max(tokens, 1), queries)
        ends = starts + draw.integers(-2, tokens + 3, queries)
        if case.distribution == "causal":
            ends = torch.arange(tokens - queries + 1, tokens + 1, device=draw.device, dtype=torch.int32)
            starts = torch.zeros_like(ends)
        return {
            "q": draw.normal(queries, spec.heads, spec.d_qk, dtype=torch.bfloat16, scale=10.0),
            "kv": draw.normal(tokens, 1, spec.d_qk, dtype=torch.bfloat16, scale=0.1),
            "sm_scale": spec.d_qk**-0.5,
            "starts": starts,
            "ends": ends,
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }

    def reference(self, spec: AttentionDenseSpec, inputs: Inputs) -> Outputs:
        given = {name: inputs[name] for name in ("q", "kv", "sm_scale", "starts", "ends", "sink")}
        return dict(zip(("out", "lse"), formulas.attend(**given, d_v=spec.d_v), strict=True))

    def allocate(self, spec: AttentionDenseSpec, inputs: Inputs) -> Outputs:
        return attended(inputs, inputs["q"].shape[:2], spec.d_v)

    def check(self, spec: AttentionDenseSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare_attended(outputs, reference)

    def cost(self, spec: AttentionDenseSpec, case: Case[AttentionDenseSizes]) -> Cost:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        pairs = queries * tokens - queries * (queries - 1) // 2
        rows = queries * spec.heads
        return Cost(
            2 * pairs * spec.heads * (spec.d_qk + spec.d_v), 2 * spec.d_qk * (rows + tokens) + rows * (2 * spec.d_v + 4), "bf16"
        )

    def cases(self, spec: AttentionDenseSpec) -> Sequence[Case[AttentionDenseSizes]]:
        sizes = ((1, 1), (5, 97), (3, 0), (0, 40))
        ragged = [Case(AttentionDenseSizes(queries, tokens), "ragged") for queries, tokens in sizes]
        return [Case(AttentionDenseSizes(9, 130), "causal"), *ragged]

    def long_cases(self, spec: AttentionDenseSpec) -> Sequence[Case[AttentionDenseSizes]]:
        return [Case(AttentionDenseSizes(301, 2500), distribution) for distribution in ("ragged", "causal")]

    def options(self, spec: AttentionDenseSpec) -> Sequence[AttentionDenseSpec]:
        return tuple(replace(spec, sink=sink) for sink in (False, True))

    def workloads(self, spec: AttentionDenseSpec) -> Sequence[Case[AttentionDenseSizes]]:
        return [Case(AttentionDenseSizes(4096, tokens), "causal") for tokens in (4096, 32768)]
