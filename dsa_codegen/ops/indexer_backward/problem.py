"""What the indexer learns from: the KL divergence of its softmax from the attention's distribution, with all gradients at once.

Loss and gradients need the same scores, so one call gives both, without a matrix of queries x tokens: rows of a bounded number
of queries are in memory. The formulas, which are the reference, stand in ``formulas``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import channels, checks, compare
from ...problem.channels import D_V
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import SCORES, Model
from ...problem.values import Spec
from ..attended import check_scale
from ..attention import OP as FORWARD
from ..attention.problem import AttentionSizes, AttentionSpec
from ..inverse_lists import check_lists, inverse_lists
from ..logits import exact
from . import formulas

WHOLE_ROW = 0


@dataclass(frozen=True)
class IndexerBackwardSpec(Spec):
    """What changes the code."""

    heads: int
    d_qk: int
    """Of the attention that is learned from."""
    index_heads: int
    index_head_dim: int
    topk: int = WHOLE_ROW
    """Chosen tokens per query (sparse training), or 0 where a query learns from its whole window (warm-up)."""
    score: str = "weighted_relu"
    deterministic: bool = False
    """Whether the keys' gradient is added up in a fixed order; that of whole windows always is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        self.require_range("d_qk", channels.LEAST, channels.MOST + channels.MOST_TAIL, channels.STEP)
        self.require_range("index_heads", 1, channels.MOST_INDEX_HEADS)
        self.require_in("index_head_dim", channels.INDEX_WIDTHS)
        self.require_range("topk", 0, 1 << 16)
        self.require_in("score", SCORES)

    @property
    def dense(self) -> bool:
        """Whether queries learn from whole windows."""
        return self.topk == WHOLE_ROW


@dataclass(frozen=True)
class IndexerBackwardSizes(AttentionSizes):
    """What varies from call to call."""


class IndexerBackwardProblem(Problem[IndexerBackwardSpec, IndexerBackwardSizes]):
    """See the module's first lines."""

    name = "indexer_backward"
    summary = "KL loss of the indexer against the attention's distribution, and its gradients: whole windows or chosen tokens."
    function = "indexer_loss"
    schema = (
        "(Tensor q, Tensor kv, Tensor total, Tensor iq, Tensor ik, Tensor iw, float sm_scale, Tensor? indices=None, "
        "Tensor? starts=None, Tensor? ends=None, str score='weighted_relu', Tensor? order=None, Tensor? offsets=None) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    spec_type = IndexerBackwardSpec
    sizes_type = IndexerBackwardSizes
    minor = frozenset({"score"})
    training: ClassVar[bool] = True

    def specs_of(self, model: Model) -> Sequence[IndexerBackwardSpec]:
        shape = model.heads, model.d_qk, model.index_heads, model.index_head_dim
        return tuple(IndexerBackwardSpec(*shape, topk, model.score) for topk in (model.topk, WHOLE_ROW))

    def repeatable(self, spec: IndexerBackwardSpec) -> bool:
        return spec.dense or spec.deterministic

    def bind(self, *args: Any) -> tuple[IndexerBackwardSpec, IndexerBackwardSizes, Inputs]:
        q, kv, total, iq, ik, iw, sm_scale, indices, starts, ends, score, order, offsets = args
        checks.one_of("score", score, SCORES)
        q = checks.tensor("q", q, (None, None, None), checks.floating(q))
        queries, heads, d_qk = q.shape
        kv = checks.tensor("kv", kv, (None, 1, d_qk), q.dtype, like=q)
        tokens = kv.shape[0]
        checks.tensor("total", total, (queries, heads), torch.float32, like=q)
        iq = checks.tensor("iq", iq, (queries, None, None), q.dtype, like=q)
        index_heads, index_head_dim = iq.shape[1:]
        ik = checks.tensor("ik", ik, (tokens, index_head_dim), q.dtype, like=q)
        checks.tensor("iw", iw, (queries, index_heads), torch.float32, like=q)
        check_scale(sm_scale)
        indices, topk = _columns(indices, starts, ends, q)
        check_lists(order, offsets, q, max(topk, 1), tokens)
        spec = IndexerBackwardSpec(heads, d_qk, index_heads, index_head_dim, topk, score, order is not None)
        given = {"q": q, "kv": kv, "total": total, "iq": iq, "ik": ik, "iw": iw, "sm_scale": sm_scale, "indices": indices}
        rest = {"starts": starts, "ends": ends, "order": order, "offsets": offsets}
        return spec, IndexerBackwardSizes(queries, tokens), {**given, **rest}

    def inputs(self, spec: IndexerBackwardSpec, case: Case[IndexerBackwardSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        forward = AttentionSpec(spec.heads, spec.d_qk, spec.topk or 1, d_v=min(spec.d_qk, D_V))
        given = FORWARD.inputs(forward, Case(AttentionSizes(queries, tokens), case.distribution), draw)
        heads, width = spec.index_heads, spec.index_head_dim
        windows = _windows(case, draw) if spec.dense else {"starts": None, "ends": None}
        indices = None if spec.dense else given["indices"]
        lists = inverse_lists(indices, tokens, width) if indices is not None and spec.deterministic else (None, None)
        return {
            **{name: given[name] for name in ("q", "kv", "sm_scale")},
            # Any total will do: what is compared is normalised by what the weights sum up to.
            "total": draw.normal(queries, spec.heads),
            "iq": draw.normal(queries, heads, width, dtype=torch.bfloat16),
            "ik": draw.normal(tokens, width, dtype=torch.bfloat16),
            "iw": draw.normal(queries, heads, scale=1.0 if spec.score == "relu_bias" else heads**-0.5),
            "indices": indices,
            **windows,
            "order": lists[0],
            "offsets": lists[1],
        }

    def reference(self, spec: IndexerBackwardSpec, inputs: Inputs) -> Outputs:
        dtype = exact(inputs["iq"]).dtype
        wide = {name: inputs[name].to(dtype) for name in ("q", "kv", "total", "iq", "ik", "iw")}
        columns = formulas.Columns(inputs["indices"], inputs["starts"], inputs["ends"])
        return formulas.learn(**wide, sm_scale=inputs["sm_scale"], columns=columns, score=spec.score)._asdict()

    def allocate(self, spec: IndexerBackwardSpec, inputs: Inputs) -> Outputs:
        loss = torch.empty(inputs["q"].shape[0], dtype=torch.float32, device=inputs["q"].device)
        return {"loss": loss, **{f"d{name}": torch.empty_like(inputs[name]) for name in ("iq", "ik", "iw")}}

    def check(self, spec: IndexerBackwardSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(
            compare.close("loss", outputs["loss"], reference["loss"], compare.LOSS),
            *(compare.gradient(name, outputs[name], reference[name]) for name in ("diq", "dik", "diw")),
        )

    def cost(self, spec: IndexerBackwardSpec, case: Case[IndexerBackwardSizes]) -> Cost:
        """The attention's scores once, the indexer's once, and the two products of its gradients."""
        queries, tokens = case.sizes.queries, case.sizes.tokens
        pairs = queries * min(spec.topk, tokens)
        if spec.dense:
            pairs = queries * tokens - queries * (queries - 1) // 2
        flops = 2 * pairs * (spec.heads * spec.d_qk + 3 * spec.index_heads * spec.index_head_dim)
        operands = 2 * (queries * spec.heads + tokens) * spec.d_qk
        operands += 4 * (queries * spec.index_heads + tokens) * spec.index_head_dim
        return Cost(flops, operands + 4 * queries * spec.topk, "bf16")

    def cases(self, spec: IndexerBackwardSpec) -> Sequence[Case[IndexerBackwardSizes]]:
        sizes = ((1, 1), (3, 77), (3, 0), (0, 40))
        return [Case(IndexerBackwardSizes(queries, tokens), "ragged") for queries, tokens in sizes]

    def long_cases(self, spec: IndexerBackwardSpec) -> Sequence[Case[IndexerBackwardSizes]]:
        return [Case(IndexerBackwardSizes(140, 2500), distribution) for distribution in ("ragged", "random")]

    def options(self, spec: IndexerBackwardSpec) -> Sequence[IndexerBackwardSpec]:
        forms = [replace(spec, score=score) for score in SCORES]
        return forms if spec.dense else (*forms, replace(spec, deterministic=True))

    def workloads(self, spec: IndexerBackwardSpec) -> Sequence[Case[IndexerBackwardSizes]]:
        return [Case(IndexerBackwardSizes(4096, 8192), "random")]


def _columns(indices: Tensor | None, starts: Tensor | None, ends: Tensor | None, q: Tensor) -> tuple[Tensor | None, int]:
    """The lists, or windows in their place, with how many tokens a list has (0 for windows)."""
    queries = q.shape[0]
    if indices is not None:
        if starts is not None or ends is not None:
            raise InputError("indices", "lists beside windows", "chosen tokens, or starts and ends")
        indices = checks.tensor("indices", indices, (queries, 1, None), torch.int32, like=q)
        return indices, indices.shape[2]
    for name, value in (("starts", starts), ("ends", ends)):
        checks.tensor(name, value, (queries,), torch.int32, like=q)
    return None, WHOLE_ROW


def _windows(case: Case[IndexerBackwardSizes], draw: Draw) -> Inputs:
    """The last queries of a causal context; or any windows, empty and absurd ones too."""
    queries, tokens = case.sizes.queries, case.sizes.tokens
    if case.distribution == "random":
        ends = torch.arange(tokens - queries + 1, tokens + 1, device=draw.device, dtype=torch.int32)
        return {"starts": torch.zeros_like(ends), "ends": ends}
    starts = draw.integers(-2, max(tokens, 1), queries)
    return {"starts": starts, "ends": starts + draw.integers(-2, tokens + 3, queries)}
