"""The stages that are a single operation: how a benchmark case becomes a call, a reference and a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import functions, ops
from ..errors import SpecError
from ..ops.attention.problem import sharing
from ..problem import compare
from ..problem.caches import tokens_of
from ..problem.draw import Draw
from ..problem.kv_layouts import kv_layout
from ..problem.op import Accuracy, Case, Inputs, Op, Outputs
from ..problem.values import Sizes, Spec
from . import agreement
from .cases import FP8_PRODUCTS, INDEXED, LOCAL, BenchCase
from .stage import Part, Prepared, Stage

LOCAL_GROUP = 16  # neighbouring queries that share indices where they are "local"
LOCAL_SHARE = 0.8  # of a query's indices
_KV_LAYOUTS = {576: "v32", 512: "v4"}  # by the channels of a query
_INDEXER = {"heads": 64, "head_dim": 128}  # that scores selections of "indexed" scores


class _Call(Protocol):
    def __call__(self, case: BenchCase, inputs: Inputs) -> Callable[[], Any]: ...


class OpStage(Stage):
    """A stage that calls one public function.

    Args:
        stated: the operation's spec and sizes for a case.
        call: the public function with its arguments.
        names: its outputs.
    """

    def __init__(self, name: str, op: str, stated: Callable[[BenchCase], tuple[Spec, Sizes]], call: _Call, *names: str) -> None:
        self.name = name
        self._op_name, self._stated, self._call, self._names = op, stated, call, names

    @property
    def op(self) -> Op:
        """The operation."""
        return ops.get(self._op_name)

    def part(self, case: BenchCase) -> Part:
        """The one part."""
        spec, sizes = self._stated(case)
        return Part(self.op, spec, Case(sizes, case.distribution))

    def parts(self, case: BenchCase) -> Sequence[Part]:
        return (self.part(case),)

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        part = self.part(case)
        return self.op.inputs(part.spec, part.case, draw)

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        def outputs(result: Any) -> Outputs:
            return dict(zip(self._names, result if isinstance(result, tuple) else (result,), strict=True))

        return Prepared("ours", self._call(case, inputs), outputs)

    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        return self.op.reference(self.part(case).spec, inputs)

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        return self.op.check(self.part(case).spec, inputs, {**reference, **outputs}, reference)


class SelectStage(OpStage):
    """Selection: a peer is judged by the scores that it chose. Scores may also be those of a random indexer."""

    def part(self, case: BenchCase) -> Part:
        return super().part(replace(case, distribution="normal") if case.distribution == INDEXED else case)

    def helpers(self, case: BenchCase) -> Sequence[Part]:
        op, sizes = ops.get("indexer"), {"queries": case["rows"], "context": case["context"]}
        indexer = Part(op, op.spec_type(**_INDEXER), Case(op.sizes_type(**sizes), "causal"))
        return (indexer,) if case.distribution == INDEXED else ()

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        if case.distribution != INDEXED:
            return super().inputs(case, draw)
        rows, columns = case["rows"], case["context"]
        starts = torch.zeros(rows, dtype=torch.int32, device=draw.device)
        windows = {"starts": starts, "ends": torch.full_like(starts, columns)}
        (indexer,) = self.helpers(case)
        drawn = indexer.op.inputs(indexer.spec, indexer.case, draw)
        none = self.part(replace(case, shape=tuple({**dict(case.shape), "rows": 0}.items())))
        given = self.op.inputs(none.spec, none.case, draw)
        return {**given, **windows, "scores": _indexer(case, {**drawn, **windows})()}

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        if exact:
            return super().check(case, inputs, outputs, reference, exact)
        scores, chosen = inputs["scores"], outputs["chosen"]
        return agreement.selection(chosen, scores, case["k"], exact=True)


class AttentionStage(OpStage):
    """Attention: lists may also be shared between neighbouring queries, as a real indexer's are."""

    def part(self, case: BenchCase) -> Part:
        return super().part(replace(case, distribution="random"))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        if case.distribution != LOCAL:
            return super().inputs(case, draw)
        part = self.part(case)
        few = Case(part.op.sizes_type(**{**part.sizes.to_dict(), **self._one_query}), "random")
        drawn = dict(self.op.inputs(part.spec, few, draw))
        rows = self._rows(case)
        drawn["q"] = draw.normal(*rows, *drawn["q"].shape[-2:], dtype=torch.bfloat16, scale=self._q_scale)
        drawn["indices"] = self._lists(case, draw)
        return drawn

    _one_query: Mapping[str, int] = {"queries": 1}
    _q_scale = 10.0  # as the operation draws them

    def _rows(self, case: BenchCase) -> tuple[int, ...]:
        return (case["queries"],)

    def _lists(self, case: BenchCase, draw: Draw) -> Tensor:
        return local_indices(draw, case["queries"], case["context"], case["k"])[:, None]


class PrefillStage(AttentionStage):
    """Prefill attention; where products in FP8 are allowed ours are, too, of what was quantised beforehand."""

    def parts(self, case: BenchCase) -> Sequence[Part]:
        part = self.part(case)
        return (replace(part, spec=replace(part.spec, **_FP8)) if case.distribution == FP8_PRODUCTS else part,)

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        """Ours of FP8 must be what FP8 gives; the similarity is that to what was not quantised, all that peers keep."""
        if case.distribution != FP8_PRODUCTS:
            return super().check(case, inputs, outputs, reference, exact)
        if not exact:
            return compare.close("out", outputs["out"], reference["out"], _QUANTISED)
        (part,) = self.parts(case)
        given = {**inputs, **_in_fp8(inputs)}
        accuracy = self.op.check(part.spec, given, outputs, self.op.reference(part.spec, given))
        return replace(accuracy, similarity=compare.similarity_gap(outputs["out"], reference["out"]))


class DecodeStage(AttentionStage):
    """The same over a paged cache; neighbours are the new queries of one sequence."""

    _one_query: Mapping[str, int] = {"batch": 1, "next_n": 1}
    _q_scale = 1.0

    def _rows(self, case: BenchCase) -> tuple[int, ...]:
        return case["batch"], case["next_n"]

    def _lists(self, case: BenchCase, draw: Draw) -> Tensor:
        batch, next_n = self._rows(case)
        slots = batch * case["context"]
        return local_indices(draw, batch * next_n, slots, case["k"], next_n).view(batch, next_n, case["k"])


class PromptOverCacheStage(DecodeStage):
    """As many rows as a prompt has, over the paged cache of one sequence: prefill without a BF16 copy of the latents."""

    def _rows(self, case: BenchCase) -> tuple[int, ...]:
        return case["queries"], 1

    def _lists(self, case: BenchCase, draw: Draw) -> Tensor:
        return local_indices(draw, case["queries"], case["context"], case["k"])[:, None]

    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        """By the prefill reference on what the cache states, which takes many rows at once."""
        cache = inputs["cache"]
        layout = kv_layout(_KV_LAYOUTS[case["head_dim"]], case["page"])
        slots = torch.arange(tokens_of(layout, cache), device=cache.device)
        latents = layout.dequantize(cache, slots).bfloat16()[:, None]
        prefill = ops.get("attention")
        spec = prefill.spec_type(**{"heads": case["heads"], "d_qk": case["head_dim"], "topk": case["k"]})
        flat = {**inputs, "q": inputs["q"][:, 0], "kv": latents}
        return {name: value[:, None] for name, value in prefill.reference(spec, flat).items()}


def local_indices(draw: Draw, queries: int, tokens: int, topk: int, group: int = LOCAL_GROUP) -> Tensor:
    """int32 [queries, topk]: distinct random tokens, of which ``group`` neighbouring queries, 16 at most, share 80 %."""
    shared, group = int(LOCAL_SHARE * topk), min(group, LOCAL_GROUP)
    own = topk - shared
    chosen = torch.empty(queries, topk, dtype=torch.int32, device=draw.device)
    for first in range(0, queries, group):
        rows = chosen[first : first + group]
        order = draw.permutation(tokens)[: shared + own * len(rows)].int()
        rows[:, :shared] = order[:shared]
        rows[:, shared:] = order[shared:].view(len(rows), own)
    return chosen


def indexer_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    """The prefill indexer of a case."""
    op = ops.get("indexer")
    spec = {"heads": case["heads"], "head_dim": case["head_dim"]}
    return op.spec_type(**spec), op.sizes_type(**{"queries": case["queries"], "context": case["context"]})


def indexer_paged_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    """The decode indexer of a case."""
    op = ops.get("indexer_paged")
    spec = {name: case[name] for name in ("heads", "head_dim", "next_n", "page")}
    return op.spec_type(**spec), op.sizes_type(**{"batch": case["batch"], "context": case["context"]})


def _select_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("select")
    return op.spec_type(**{"topk": case["k"]}), op.sizes_type(**{"rows": case["rows"], "columns": case["context"]})


def _attention_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("attention")
    spec = {"heads": case["heads"], "d_qk": case["head_dim"], "topk": case["k"], "share": sharing(case["heads"], _share(case))}
    return op.spec_type(**spec), op.sizes_type(**{"queries": case["queries"], "tokens": case["context"]})


def _share(case: BenchCase) -> int:
    """What a user asks for who knows that neighbours choose alike."""
    return 4 if case.distribution == LOCAL else 1


def _attention_paged_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("attention_paged")
    layout = _KV_LAYOUTS.get(case["head_dim"])
    if layout is None:
        raise SpecError("head_dim", case["head_dim"], f"that of a cache of FP8: {' or '.join(map(str, _KV_LAYOUTS))}")
    spec: dict[str, Any] = {"heads": case["heads"], "topk": case["k"], "kv_layout": layout, "page": case["page"]}
    if "extra_k" in dict(case.shape):
        spec |= {"extra_topk": case["extra_k"], "extra_page": case["page"]}
    if "queries" in dict(case.shape):
        sizes = {"batch": case["queries"], "next_n": 1, "tokens": case["context"]}
    else:
        sizes = {"batch": case["batch"], "next_n": case["next_n"], "tokens": case["batch"] * case["context"]}
    return op.spec_type(**spec), op.sizes_type(**sizes)


def _indexer(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x = inputs
    return lambda: functions.indexer_logits(x["q"], x["k"], x["k_scale"], x["weights"], x["starts"], x["ends"])


def _indexer_paged(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x = inputs
    rest = x["weights"], x["lengths"], x["page_table"], x["max_context"]
    return lambda: functions.indexer_logits_paged(x["q"], x["cache"], *rest)


def _select(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x, topk = inputs, case["k"]
    return lambda: functions.select(x["scores"], x["ends"], topk, starts=x["starts"])


_FP8 = {"math": "fp8"}
_QUANTISED = compare.Limit(similarity=2e-3)  # on random data 1.4e-3


def _in_fp8(inputs: Inputs) -> dict[str, Any]:
    """Queries and tokens in e4m3 and their scales."""
    (q, q_scale), (kv, kv_scale) = functions.quantize_latents(inputs["q"]), functions.quantize_latents(inputs["kv"])
    return {"q": q, "kv": kv, "q_scale": q_scale, "kv_scale": kv_scale}


def _attention(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x = inputs
    if case.distribution == FP8_PRODUCTS:
        given = _in_fp8(inputs)
        return lambda: functions.sparse_attention(**given, indices=x["indices"], sm_scale=x["sm_scale"], math="fp8")
    return lambda: functions.sparse_attention(x["q"], x["kv"], x["indices"], x["sm_scale"], share=_share(case))


def _attention_paged(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x = inputs
    if x.get("extra_cache") is None:
        return lambda: functions.sparse_attention_paged(x["q"], x["cache"], x["indices"], x["sm_scale"])
    second = {name: x[name] for name in ("extra_cache", "extra_indices")}
    return lambda: functions.sparse_attention_paged(x["q"], x["cache"], x["indices"], x["sm_scale"], **second)


def masked_logits(op_name: str, spec: Spec, inputs: Inputs) -> Tensor:
    """The reference's logits, fp32, -inf outside the windows."""
    return ops.get(op_name).reference(spec, inputs)["logits"].float().nan_to_num(nan=-math.inf, neginf=-math.inf)


SINGLE = (
    OpStage("indexer_prefill", "indexer", indexer_spec, _indexer, "logits"),
    OpStage("indexer_decode", "indexer_paged", indexer_paged_spec, _indexer_paged, "logits"),
    SelectStage("select", "select", _select_spec, _select, "chosen"),
    PrefillStage("attention_prefill", "attention", _attention_spec, _attention, "out", "lse"),
    PromptOverCacheStage("attention_prefill_paged", "attention_paged", _attention_paged_spec, _attention_paged, "out", "lse"),
    DecodeStage("attention_decode", "attention_paged", _attention_paged_spec, _attention_paged, "out", "lse"),
)
