"""Attention over disjoint parts of the tokens, joined by the logarithm of each part's denominator.

``out = Σ_p exp(lse_p - lse) · out_p`` with ``lse = log Σ_p exp(lse_p)``: each part's share of the whole denominator. A part
without a token of a row has lse -inf, whatever its output holds there.
"""

from __future__ import annotations

import functools
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

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LEAST = torch.finfo(torch.float32).min  # of a logarithm: its share of anything is 0, and no part's is -inf minus -inf


@dataclass(frozen=True)
class MergePartsSpec(Spec):
    """What changes the code."""

    d_v: int
    sink: bool = False
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("d_v", 1, 1024)
        self.require_in("dtype", DTYPES)


@dataclass(frozen=True)
class MergePartsSizes(Sizes):
    """What varies from call to call."""

    rows: int
    """Queries times heads."""
    parts: int
    heads: int = 16
    """Neighbouring rows with sinks of their own."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (2049,)}


class MergePartsProblem(Problem[MergePartsSpec, MergePartsSizes]):
    """See the module's first lines."""

    name = "merge_parts"
    summary = "Attention over disjoint parts of the tokens joined to that over all of them, by lse; a sink counts once."
    function = "merge_attention"
    schema = "(Tensor out, Tensor lse, Tensor? sink=None) -> (Tensor, Tensor)"
    spec_type = MergePartsSpec
    sizes_type = MergePartsSizes
    minor = frozenset({"sink"})

    def specs_of(self, model: Model) -> Sequence[MergePartsSpec]:
        if model.kv_layout == NO_CACHE:
            return ()
        return (MergePartsSpec(model.d_v, sink=model.attn_sink),)

    def bind(self, *args: Any) -> tuple[MergePartsSpec, MergePartsSizes, Inputs]:
        out, lse, sink = args
        out = checks.tensor("out", out, (None, None, None, None), tuple(DTYPES.values()), inner_contiguous=True)
        lse = checks.tensor("lse", lse, tuple(out.shape[:-1]), torch.float32, like=out, inner_contiguous=True)
        parts, queries, heads, d_v = out.shape
        for name, value in (("out", out), ("lse", lse)):
            if parts < 1 or not value[0].is_contiguous():
                raise InputError(name, f"{parts} parts with strides {value.stride()}", "1 or more, each of them contiguous")
        if sink is not None:
            checks.tensor("sink", sink, (heads,), torch.float32, like=out)
        named = next(name for name, dtype in DTYPES.items() if dtype == out.dtype)
        sizes = MergePartsSizes(queries * heads, parts, heads)
        return MergePartsSpec(d_v, sink is not None, named), sizes, {"out": out, "lse": lse, "sink": sink}

    def inputs(self, spec: MergePartsSpec, case: Case[MergePartsSizes], draw: Draw) -> Inputs:
        parts, heads = case.sizes.parts, case.sizes.heads
        queries = case.sizes.rows // heads
        out = draw.normal(parts, queries, heads, spec.d_v, dtype=DTYPES[spec.dtype])
        lse = draw.normal(parts, queries, heads, scale=4.0)
        lse = lse.masked_fill(draw.uniform(parts, queries, heads) < 0.3, -torch.inf)
        lse[:, queries // 2 : queries // 2 + 1] = -torch.inf  # a row without a token
        out = out.masked_fill(lse.isneginf()[..., None], torch.nan)  # nothing is read there
        return {"out": out, "lse": lse, "sink": draw.normal(heads) if spec.sink else None}

    def reference(self, spec: MergePartsSpec, inputs: Inputs) -> Outputs:
        out, lse, sink = inputs["out"], inputs["lse"], inputs["sink"]
        total = functools.reduce(torch.logaddexp, lse)
        share = lse.clamp(min=_LEAST).softmax(0)  # of a row without a token any shares will do, as all its parts are 0
        if sink is not None:
            share = share * (total.clamp(min=_LEAST) - sink).sigmoid()
        merged = torch.zeros_like(out[0], dtype=torch.float32)
        for part, own, weight in zip(out, lse, share, strict=True):  # in fp32 all of them at once take twice the memory
            merged.addcmul_(part.masked_fill(own.isneginf()[..., None], 0), weight[..., None])
        return {"merged": merged.to(out.dtype), "total": total}

    def allocate(self, spec: MergePartsSpec, inputs: Inputs) -> Outputs:
        out, lse = inputs["out"], inputs["lse"]
        return {"merged": out.new_empty(out.shape[1:]), "total": lse.new_empty(lse.shape[1:])}

    def check(self, spec: MergePartsSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(
            compare.close("merged", outputs["merged"], reference["merged"], compare.ATTENTION),
            compare.close("total", outputs["total"], reference["total"], compare.LSE),
        )

    def cost(self, spec: MergePartsSpec, case: Case[MergePartsSizes]) -> Cost:
        values = case.sizes.rows * spec.d_v
        size = DTYPES[spec.dtype].itemsize
        return Cost(2.0 * values * case.sizes.parts, values * size * (case.sizes.parts + 1), "fp32")

    def cases(self, spec: MergePartsSpec) -> Sequence[Case[MergePartsSizes]]:
        plain = [MergePartsSizes(rows, parts, heads) for rows, parts, heads in ((24, 2, 8), (9, 3, 3), (4, 1, 4), (0, 2, 4))]
        return [Case(sizes) for sizes in plain]

    def options(self, spec: MergePartsSpec) -> Sequence[MergePartsSpec]:
        return (spec, replace(spec, sink=not spec.sink), replace(spec, dtype="fp32"), replace(spec, d_v=40))

    def workloads(self, spec: MergePartsSpec) -> Sequence[Case[MergePartsSizes]]:
        return [Case(MergePartsSizes(rows, parts, 64)) for rows, parts in ((64, 2), (4096, 2))]
