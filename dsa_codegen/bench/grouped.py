"""The stages of grouped queries: lists of blocks, one for each KV head, over rows of keys and values or over their pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import functions, ops
from ..problem.op import Case, Inputs
from ..problem.values import Sizes, Spec
from .cases import LOCAL, BenchCase
from .stage import Part
from .stages import OpStage


class GroupedStage(OpStage):
    """Lists of neighbours that hold mostly the same are drawn where ours is asked to share them."""

    def part(self, case: BenchCase) -> Part:
        spec, sizes = self._stated(case)
        return Part(self.op, spec, Case(sizes, "random"))


def _share(case: BenchCase) -> int:
    """What a user asks for who knows that neighbours choose alike."""
    return 4 if case.distribution == LOCAL else 1


def _stated(rows: Callable[[BenchCase], int]) -> Callable[[BenchCase], tuple[Spec, Sizes]]:
    """The spec and sizes of a case, whose rows are its queries or those of all its sequences."""

    def stated(case: BenchCase) -> tuple[Spec, Sizes]:
        op, width = ops.get("attention_gqa"), case["head_dim"]
        spec = {"d_qk": width, "d_v": width, "topk": case["k"] // case["block"], "ends": True}
        spec |= {name: case[name] for name in ("heads", "kv_heads", "block")}
        spec |= {"page": dict(case.shape).get("page", 0)}
        return op.spec_type(**spec), op.sizes_type(**{"rows": rows(case), "tokens": case["context"]})

    return stated


def _sharing(stated: Callable[[BenchCase], tuple[Spec, Sizes]]) -> Callable[[BenchCase], tuple[Spec, Sizes]]:
    """The same, with rows that share where neighbours choose alike."""

    def shared(case: BenchCase) -> tuple[Spec, Sizes]:
        spec, sizes = stated(case)
        return replace(spec, **{"share": _share(case)}), sizes

    return shared


def _prefill(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x, block, share = inputs, case["block"], _share(case)
    given = x["q"], x["k"], x["v"], x["indices"], x["sm_scale"]
    return lambda: functions.sparse_attention_gqa(*given, block=block, ends=x["ends"], share=share)


def _decode(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x, by_sequence = inputs, (case["batch"], case["next_n"])
    q, indices, ends = (x[name].unflatten(0, by_sequence) for name in ("q", "indices", "ends"))
    tensors = q, x["k"], x["v"], indices, x["page_table"], x["sm_scale"]

    def run() -> Any:
        out, lse = functions.sparse_attention_gqa_paged(*tensors, block=case["block"], ends=ends)
        return out.flatten(0, 1), lse.flatten(0, 1)

    return run


GROUPED = (
    GroupedStage("gqa_prefill", "attention_gqa", _sharing(_stated(lambda case: case["queries"])), _prefill, "out", "lse"),
    GroupedStage("gqa_decode", "attention_gqa", _stated(lambda case: case["batch"] * case["next_n"]), _decode, "out", "lse"),
)
