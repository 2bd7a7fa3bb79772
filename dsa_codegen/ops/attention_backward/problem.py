"""The backward of sparse MLA: gradients of queries, tokens and sinks from those of ``out`` and ``lse``.

The formulas, which are the reference, stand in ``formulas``. A token's gradient is a sum over the queries that chose it: added
up by atomics in whatever order they come (fast), or in the order of inverse lists (deterministic: the same bits in every run).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...problem import channels, checks, compare
from ...problem.channels import D_V
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import Model
from ...problem.values import Spec
from ..attention import OP as FORWARD
from ..attention.problem import AttentionSizes, AttentionSpec
from ..inverse_lists import check_lists, inverse_lists
from ..logits import exact
from . import formulas


@dataclass(frozen=True)
class AttentionBackwardSpec(Spec):
    """What changes the backward's code."""

    heads: int
    d_qk: int
    """As in the forward."""
    topk: int
    lengths: bool = False
    sink: bool = False
    lse_gradient: bool = False
    """Whether lse has a gradient too, as where parts of an attention are merged by it."""
    deterministic: bool = False
    """Whether a token's gradient is added up in a fixed order."""
    d_v: int = D_V
    """As in the forward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        channels.require(self)
        self.require_range("topk", 1, 1 << 16)


@dataclass(frozen=True)
class AttentionBackwardSizes(AttentionSizes):
    """What varies from call to call."""


class AttentionBackwardProblem(Problem[AttentionBackwardSpec, AttentionBackwardSizes]):
    """See the module's first lines."""

    name = "attention_backward"
    summary = "Backward of sparse MLA: gradients of queries, tokens and sinks; tokens' by atomics or in a fixed order."
    function = "sparse_attention_backward"
    schema = (
        "(Tensor q, Tensor kv, Tensor indices, float sm_scale, Tensor out, Tensor lse, Tensor do, Tensor? dlse=None, "
        "Tensor? lengths=None, Tensor? sink=None, Tensor? order=None, Tensor? offsets=None) -> Tensor[]"
    )
    spec_type = AttentionBackwardSpec
    sizes_type = AttentionBackwardSizes
    minor = frozenset({"lengths", "sink", "lse_gradient"})
    training: ClassVar[bool] = True

    def specs_of(self, model: Model) -> Sequence[AttentionBackwardSpec]:
        return (AttentionBackwardSpec(model.heads, model.d_qk, model.topk, sink=model.attn_sink, d_v=model.d_v),)

    def repeatable(self, spec: AttentionBackwardSpec) -> bool:
        return spec.deterministic

    def bind(self, *args: Any) -> tuple[AttentionBackwardSpec, AttentionBackwardSizes, Inputs]:
        q, kv, indices, sm_scale, out, lse, do, dlse, lengths, sink, order, offsets = args
        checks.check_kind("out", out, "Tensor")
        d_v = out.shape[-1] if out.dim() else 0
        _, sizes, inputs = FORWARD.bind(q, kv, indices, sm_scale, lengths, sink, 1, False, d_v, "bf16", None, None)
        q, kv, indices = inputs["q"], inputs["kv"], inputs["indices"]
        (queries, heads, d_qk), topk = q.shape, indices.shape[2]
        for name, value in (("out", out), ("do", do)):
            checks.tensor(name, value, (queries, heads, d_v), q.dtype, like=q)
        checks.tensor("lse", lse, (queries, heads), torch.float32, like=q)
        if dlse is not None:
            checks.tensor("dlse", dlse, (queries, heads), torch.float32, like=q)
        check_lists(order, offsets, q, topk, kv.shape[0])
        spec = AttentionBackwardSpec(
            heads, d_qk, topk, lengths is not None, sink is not None, dlse is not None, order is not None, d_v
        )
        given = {"out": out, "lse": lse, "do": do, "dlse": dlse, "order": order, "offsets": offsets}
        return spec, AttentionBackwardSizes(sizes.queries, sizes.tokens), {**inputs, **given}

    def inputs(self, spec: AttentionBackwardSpec, case: Case[AttentionBackwardSizes], draw: Draw) -> Inputs:
        forward = AttentionSpec(spec.heads, spec.d_qk, spec.topk, spec.lengths, spec.sink, d_v=spec.d_v)
        given = FORWARD.inputs(forward, Case(AttentionSizes(case.sizes.queries, case.sizes.tokens), case.distribution), draw)
        rows = case.sizes.queries, spec.heads
        attended = FORWARD.allocate(forward, given)
        if draw.device != "meta":
            attended = FORWARD.reference(forward, given)
        return {
            **given,
            "out": attended["out"].bfloat16(),
            "lse": attended["lse"],
            "do": draw.normal(*rows, spec.d_v, dtype=torch.bfloat16),
            "dlse": draw.normal(*rows) if spec.lse_gradient else None,
            **_drawn_lists(spec, case, given, draw),
        }

    def reference(self, spec: AttentionBackwardSpec, inputs: Inputs) -> Outputs:
        names = ("q", "kv", "out", "lse", "do", "dlse", "sink")
        given: dict[str, Any] = {name: inputs[name] for name in ("indices", "sm_scale", "lengths")}
        dtype = exact(inputs["q"]).dtype
        given |= {name: None if inputs[name] is None else inputs[name].to(dtype) for name in names}
        found = formulas.gradients(**given)._asdict()
        return {name: value for name, value in found.items() if value is not None}

    def allocate(self, spec: AttentionBackwardSpec, inputs: Inputs) -> Outputs:
        outputs = {"dq": torch.empty_like(inputs["q"]), "dkv": torch.empty_like(inputs["kv"])}
        return {**outputs, "dsink": torch.empty_like(inputs["sink"])} if spec.sink else outputs

    def check(self, spec: AttentionBackwardSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(*(compare.gradient(name, outputs[name], value) for name, value in reference.items()))

    def cost(self, spec: AttentionBackwardSpec, case: Case[AttentionBackwardSizes]) -> Cost:
        """Five products: scores, their gradient, dq, and the two that dkv is the sum of."""
        queries, tokens = case.sizes.queries, case.sizes.tokens
        chosen = min(spec.topk, tokens)
        flops = 2 * queries * spec.heads * chosen * (3 * spec.d_qk + 2 * spec.d_v)
        rows = min(tokens, queries * chosen)
        per_query = 2 * spec.heads * (2 * spec.d_qk + 2 * spec.d_v) + 4 * spec.topk
        return Cost(flops, queries * per_query + 2 * spec.d_qk * (rows + tokens), "bf16")

    def cases(self, spec: AttentionBackwardSpec) -> Sequence[Case[AttentionBackwardSizes]]:
        sizes = ((1, 1), (5, 97), (3, 0), (0, 40))
        ragged = [Case(AttentionBackwardSizes(queries, tokens), "ragged") for queries, tokens in sizes]
        return [Case(AttentionBackwardSizes(3, 60), "random"), *ragged]

    def long_cases(self, spec: AttentionBackwardSpec) -> Sequence[Case[AttentionBackwardSizes]]:
        sizes = ((301, 2500, "ragged"), (140, 4096, "random"))
        return [Case(AttentionBackwardSizes(queries, tokens), distribution) for queries, tokens, distribution in sizes]

    def options(self, spec: AttentionBackwardSpec) -> Sequence[AttentionBackwardSpec]:
        changes: tuple[dict[str, Any], ...] = ({}, {"deterministic": True}, {"lengths": True, "sink": True})
        every = {"lengths": True, "sink": True, "lse_gradient": True, "deterministic": True}
        return tuple(replace(spec, **change) for change in (*changes, every))

    def workloads(self, spec: AttentionBackwardSpec) -> Sequence[Case[AttentionBackwardSizes]]:
        return [Case(AttentionBackwardSizes(4096, tokens), "random") for tokens in (8192, 131072)]


def _drawn_lists(spec: AttentionBackwardSpec, case: Case[Any], given: Inputs, draw: Draw) -> Inputs:
    if not spec.deterministic:
        return {"order": None, "offsets": None}
    order, offsets = inverse_lists(given["indices"], case.sizes.tokens, spec.d_qk, given["lengths"])
    return {"order": order, "offsets": offsets}
