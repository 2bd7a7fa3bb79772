"""The stages that chain operations: indexer and selection, and the whole layer, in prefill and in decode.

A chained choice is judged by the reference's scores of the tokens it chose, attention by the reference's attention over the
tokens that this very implementation chose: whoever rounds logits differently may pick other tokens at the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import functions, ops
from ..choice import LOGITS_BYTES
from ..layer import Layer
from ..problem import compare, presets
from ..problem.caches import IndexKLayout, KvV32Layout
from ..problem.draw import Draw
from ..problem.op import Accuracy, Case, Cost, Inputs, Outputs
from ..problem.quantization import quantize_groups
from ..problem.values import Sizes, Spec
from .agreement import selection, tokens_of_slots
from .cases import BenchCase
from .stage import Part, Prepared, Stage
from .stages import indexer_paged_spec, indexer_spec, masked_logits

Fields = dict[str, int | bool | str]

_FILL = 1 << 18  # tokens of a cache that are drawn at a time


def layer_of(case: BenchCase) -> Layer:
    """The layer of DeepSeek-V3.2, with the heads and the page of the case."""
    model = presets.preset("deepseek-v3.2")
    page = dict(case.shape).get("page", model.page)
    return Layer(replace(model, heads=case["heads"], topk=case["k"], page=page))


class IndexSelectPrefill(Stage):
    """Logits, then their highest."""

    name = "index_select_prefill"

    def parts(self, case: BenchCase) -> Sequence[Part]:
        queries, context = case["queries"], case["context"]
        spec, sizes = indexer_spec(case)
        select = part_of("select", {"topk": case["k"]}, {"rows": queries, "columns": context}, "normal")
        return Part(ops.get("indexer"), spec, Case(sizes, "causal")), select

    def costs(self, case: BenchCase) -> Sequence[Cost]:
        return _fused(self.parts(case))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        part = self.parts(case)[0]
        return part.op.inputs(part.spec, part.case, draw)

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        q, k, k_scale, weights, starts, ends = _in(inputs, "q k k_scale weights starts ends")

        def run() -> Tensor:
            logits = functions.indexer_logits(q, k, k_scale, weights, starts, ends)
            return functions.select(logits, ends, case["k"], starts=starts)

        return Prepared("ours", run, lambda chosen: {"chosen": chosen})

    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        return {"logits": masked_logits("indexer", self.parts(case)[0].spec, inputs)}

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        return selection(outputs["chosen"], reference["logits"], case["k"], exact=False)


class IndexSelectDecode(IndexSelectPrefill):
    """The same over a paged cache; what is chosen are slots."""

    name = "index_select_decode"

    def parts(self, case: BenchCase) -> Sequence[Part]:
        rows = case["batch"] * case["next_n"]
        spec, sizes = indexer_paged_spec(case)
        paged: Fields = {"topk": case["k"], "starts": False, "output": "slots", "page": case["page"]}
        select = part_of("select", paged, {"rows": rows, "columns": case["context"]}, "normal")
        return Part(ops.get("indexer_paged"), spec, Case(sizes, "full")), select

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        q, cache, weights, lengths, page_table = _in(inputs, "q cache weights lengths page_table")
        ends, page = lengths.flatten(), case["page"]

        def run() -> Tensor:
            logits = functions.indexer_logits_paged(q, cache, weights, lengths, page_table, case["context"])
            return functions.select(logits, ends, case["k"], page_table=page_table, page=page)

        return Prepared("ours", run, lambda chosen: {"chosen": chosen})

    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        return {"logits": masked_logits("indexer_paged", self.parts(case)[0].spec, inputs)}

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        tokens = tokens_of_slots(outputs["chosen"], inputs["page_table"], case["page"])
        return selection(tokens, reference["logits"], case["k"], exact=False)


class LayerPrefill(Stage):
    """Quantised queries, indexer, selection and attention of DeepSeek-V3.2."""

    name = "layer_prefill"

    def _index_case(self, case: BenchCase) -> BenchCase:
        model = layer_of(case).model
        index = {"heads": model.index_heads, "head_dim": model.index_head_dim}
        return replace(case, shape=tuple({**dict(case.shape), **index}.items()))

    def parts(self, case: BenchCase) -> Sequence[Part]:
        queries, context, heads = case["queries"], case["context"], case["heads"]
        attention = part_of(
            "attention",
            {"heads": heads, "d_qk": case["head_dim"], "topk": case["k"]},
            {"queries": queries, "tokens": context},
            "random",
        )
        return *IndexSelectPrefill().parts(self._index_case(case)), attention

    def helpers(self, case: BenchCase) -> Sequence[Part]:
        portion = min(case["queries"], max(4, LOGITS_BYTES // (4 * case["context"]) // 4 * 4))  # as the layer divides them
        smaller = replace(case, shape=tuple({**dict(case.shape), "queries": portion}.items()))
        return *self.parts(smaller)[:2], self._quantize(case, case["queries"])

    def _quantize(self, case: BenchCase, queries: int) -> Part:
        model = layer_of(case).model
        spec: Fields = {"width": model.index_head_dim, "heads": model.index_heads, "weights": "fp32"}
        return part_of("quantize", spec, {"tokens": queries}, "normal")

    def costs(self, case: BenchCase) -> Sequence[Cost]:
        return _fused(self.parts(case))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        queries, context, d = case["queries"], case["context"], case["head_dim"]
        model = layer_of(case).model
        index_k, index_k_scale = quantize_groups(draw.normal(context, model.index_head_dim), model.index_head_dim)
        ends = torch.arange(context - queries + 1, context + 1, device=draw.device, dtype=torch.int32)
        return {
            "q": draw.normal(queries, case["heads"], d, dtype=torch.bfloat16, scale=10.0),
            "kv": draw.normal(context, 1, d, dtype=torch.bfloat16, scale=0.1),
            "index_q": draw.normal(queries, model.index_heads, model.index_head_dim, dtype=torch.bfloat16),
            "index_weights": draw.normal(queries, model.index_heads),
            "k": index_k,
            "k_scale": index_k_scale.flatten(),
            "starts": torch.zeros_like(ends),
            "ends": ends,
            "sm_scale": d**-0.5,
        }

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        layer = layer_of(case)
        args = _in(inputs, "q kv index_q index_weights k k_scale starts ends")
        return Prepared("ours", lambda: layer.prefill(*args), lambda attended: attended._asdict())

    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        q, weights = functions.quantize_index_q(inputs["index_q"], inputs["index_weights"])
        spec = self.parts(case)[0].spec
        return {"logits": masked_logits("indexer", spec, {**inputs, "q": q, "weights": weights})}

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        chosen, part = outputs["chosen"], self.parts(case)[-1]
        attended = {**inputs, "indices": chosen[:, None], "lengths": None, "sink": None}
        expected = part.op.reference(part.spec, attended)
        limits = compare.close("out", outputs["out"], expected["out"], compare.ATTENTION)
        return compare.worst(selection(chosen, reference["logits"], case["k"], exact=False), limits)


class LayerDecode(LayerPrefill):
    """The same over paged caches."""

    name = "layer_decode"

    def parts(self, case: BenchCase) -> Sequence[Part]:
        batch, next_n = case["batch"], case["next_n"]
        attention = part_of(
            "attention_paged",
            {"heads": case["heads"], "topk": case["k"], "page": case["page"]},
            {"batch": batch, "next_n": next_n, "tokens": batch * case["context"]},
            "random",
        )
        return *IndexSelectDecode().parts(self._index_case(case)), attention

    def helpers(self, case: BenchCase) -> Sequence[Part]:
        return (self._quantize(case, case["batch"] * case["next_n"]),)

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        batch, next_n, context, page = (case[name] for name in ("batch", "next_n", "context", "page"))
        model = layer_of(case).model
        max_pages = -(-context // page)
        blocks = batch * max_pages
        return {
            "q": draw.normal(batch, next_n, case["heads"], case["head_dim"], dtype=torch.bfloat16),
            "kv_cache": _kv_cache(draw, blocks, page),
            "index_q": draw.normal(batch, next_n, model.index_heads, model.index_head_dim, dtype=torch.bfloat16),
            "index_weights": draw.normal(batch, next_n, model.index_heads),
            "cache": _index_cache(draw, blocks, page, model.index_head_dim),
            "lengths": torch.full((batch, next_n), context, dtype=torch.int32, device=draw.device),
            "page_table": draw.permutation(blocks).view(batch, max_pages).int(),
            "max_context": context,
            "sm_scale": case["head_dim"] ** -0.5,
        }

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        layer = layer_of(case)
        args = _in(inputs, "q kv_cache index_q index_weights cache lengths page_table max_context")
        return Prepared("ours", lambda: layer.decode(*args), lambda attended: attended._asdict())

    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        index_q, weights = inputs["index_q"], inputs["index_weights"]
        q, weights = functions.quantize_index_q(index_q.flatten(0, 1), weights.flatten(0, 1))
        spec = self.parts(case)[0].spec
        return {"logits": masked_logits("indexer_paged", spec, {**inputs, "q": q.view(index_q.shape), "weights": weights})}

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        chosen, part = outputs["chosen"], self.parts(case)[-1]
        attended = {**inputs, "cache": inputs["kv_cache"], "indices": chosen, "lengths": None, "sink": None}
        expected = part.op.reference(part.spec, attended)
        tokens = tokens_of_slots(chosen.flatten(0, 1), inputs["page_table"], case["page"])
        limits = compare.close("out", outputs["out"], expected["out"], compare.ATTENTION)
        return compare.worst(selection(tokens, reference["logits"], case["k"], exact=False), limits)


def part_of(op_name: str, spec: Fields, sizes: dict[str, int], distribution: str) -> Part:
    """One operation that a stage calls."""
    op = ops.get(op_name)
    stated: tuple[Spec, Sizes] = op.spec_type.from_dict(spec), op.sizes_type.from_dict(sizes)
    return Part(op, stated[0], Case(stated[1], distribution))


def _fused(parts: Sequence[Part]) -> list[Cost]:
    """The parts' costs without what passes from one to the next: logits that need not leave the chip, indices read back."""
    costs = [part.op.cost(part.spec, part.case) for part in parts]
    indexer, select, *rest = costs
    pairs = indexer.flops / (2 * parts[0].spec.heads * parts[0].spec.head_dim)  # type: ignore[attr-defined]
    sizes = parts[1].sizes
    chosen = 4 * sizes.rows * parts[1].spec.topk  # type: ignore[attr-defined]
    return [replace(indexer, bytes=indexer.bytes - 4 * pairs), replace(select, flops=0.0, bytes=chosen), *rest]


def _in(inputs: Inputs, names: str) -> list:
    return [inputs[name] for name in names.split()]


def _index_cache(draw: Draw, blocks: int, page: int, head_dim: int) -> Tensor:
    layout = IndexKLayout(page, head_dim)
    cache = layout.empty(blocks, draw.device)
    for first in range(0, blocks * page, _FILL):
        slots = torch.arange(first, min(first + _FILL, blocks * page), device=cache.device)
        keys, scales = quantize_groups(draw.normal(len(slots), head_dim), head_dim)
        layout.pack(cache, slots, keys, scales.flatten())
    return cache


def _kv_cache(draw: Draw, blocks: int, page: int) -> Tensor:
    layout = KvV32Layout(page)
    cache = layout.empty(blocks, draw.device)
    for first in range(0, blocks * page, _FILL):
        slots = torch.arange(first, min(first + _FILL, blocks * page), device=cache.device)
        values, scales = quantize_groups(draw.normal(len(slots), layout.d_nope, scale=0.3), layout.group)
        layout.pack(cache, slots, values, scales, draw.normal(len(slots), layout.d_rope, scale=0.3))
    return cache


CHAINED = (IndexSelectPrefill(), IndexSelectDecode(), LayerPrefill(), LayerDecode())
