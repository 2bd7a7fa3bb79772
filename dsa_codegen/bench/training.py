"""The stages of training: what one backward call costs, over causal lists, as the peers that have one time theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..problem.draw import Draw
from ..problem.op import Case, Inputs
from ..problem.values import Sizes, Spec
from ..runtime import torch_ops
from ..train.sparse import gradients
from .cases import IN_ORDER, BenchCase
from .stage import Part
from .stages import OpStage

_INDEXER = {"index_heads": 64, "index_head_dim": 128}
_SMALL_INDEXER = {"index_heads": 8, "index_head_dim": 64}  # beside few heads
_FEW_HEADS = 16


class BackwardStage(OpStage):
    """The backward of sparse attention; ``out`` and ``lse`` are the forward's."""

    def part(self, case: BenchCase) -> Part:
        spec, sizes = self._stated(case)
        return Part(self.op, spec, Case(sizes, "random"))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        forward, (spec, sizes) = ops.get("attention"), _forward(case)
        few = Case(forward.sizes_type(**{**sizes.to_dict(), "queries": 1}), "random")
        given: dict[str, Any] = dict(forward.inputs(spec, few, draw))
        queries, heads, d_v = case["queries"], case["heads"], 512
        given["q"] = draw.normal(queries, heads, case["head_dim"], dtype=torch.bfloat16, scale=10.0)
        given["indices"] = causal_lists(draw, queries, case["context"], case["k"])[:, None]
        attended = forward.reference(spec, given)
        do = draw.normal(queries, heads, d_v, dtype=torch.bfloat16)
        given |= {"out": attended["out"].bfloat16(), "lse": attended["lse"], "do": do, "dlse": None}
        return given


def causal_lists(draw: Draw, queries: int, tokens: int, topk: int) -> Tensor:
    """int32 [queries, topk]: query t has random tokens up to t, no token twice, -1 where there are fewer than topk."""
    chosen = torch.full((queries, topk), -1, dtype=torch.int32, device=draw.device)
    token = torch.arange(tokens, device=draw.device)
    for first in range(0, queries, 64):
        rows = chosen[first : first + 64]
        query = torch.arange(first, first + len(rows), device=draw.device)
        rank = draw.uniform(len(rows), tokens).masked_fill(token > query[:, None], -1.0)
        best = rank.topk(min(topk, tokens), dim=1)
        rows[:, : best.indices.shape[1]] = torch.where(best.values < 0, -1, best.indices).int()
    return chosen


class LearningStage(OpStage):
    """The indexer's loss with its gradients."""

    def part(self, case: BenchCase) -> Part:
        spec, sizes = self._stated(case)
        return Part(self.op, spec, Case(sizes, "random"))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        given: Mapping[str, Any] = super().inputs(case, draw)
        if given["indices"] is None:
            return given
        return {**given, "indices": causal_lists(draw, case["queries"], case["context"], case["k"])[:, None]}


def _forward(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("attention")
    sizes = op.sizes_type(**{"queries": case["queries"], "tokens": case["context"]})
    return op.spec_type(**{"heads": case["heads"], "d_qk": case["head_dim"], "topk": case["k"]}), sizes


def _attention_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("attention_backward")
    spec: dict[str, Any] = {"heads": case["heads"], "d_qk": case["head_dim"], "topk": case["k"]}
    sizes = op.sizes_type(**{"queries": case["queries"], "tokens": case["context"]})
    return op.spec_type(**{**spec, "deterministic": case.distribution == IN_ORDER}), sizes


def _indexer_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("indexer_backward")
    indexer = _SMALL_INDEXER if case["heads"] <= _FEW_HEADS else _INDEXER
    sizes = op.sizes_type(**{"queries": case["queries"], "tokens": case["context"]})
    spec: dict[str, Any] = {"heads": case["heads"], "d_qk": case["head_dim"], **indexer}
    return op.spec_type(**{**spec, "topk": dict(case.shape).get("k", 0)}), sizes


def _attention(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    given = [inputs[name] for name in ("q", "kv", "indices", "sm_scale", "out", "lse", "do")]
    in_order = case.distribution == IN_ORDER
    return lambda: tuple(gradients(*given, deterministic=in_order))


def _indexer(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    operator = torch_ops.function("indexer_loss")
    names = ("q", "kv", "total", "iq", "ik", "iw", "sm_scale", "indices", "starts", "ends")
    return lambda: operator(*[inputs[name] for name in names])


TRAINING = (
    BackwardStage("attention_backward", "attention_backward", _attention_spec, _attention, "dq", "dkv"),
    LearningStage("indexer_backward", "indexer_backward", _indexer_spec, _indexer, "loss", "diq", "dik", "diw"),
)
