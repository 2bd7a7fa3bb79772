"""The stages of an engine's step: a layer as SGLang chains it (quantise, store, logits, choose, attend), through the drop-ins.

New tokens' index keys and latents are quantised and stored by this package's kernels for everybody; what is compared are the
three functions that an engine calls behind them: the libraries' own, and ours under their names (``compat``). The new tokens
lie in the caches that a case is given, so that storing them again changes nothing for whoever comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..choice import slots_of
from ..compat import deep_gemm, fast_topk, flash_mla
from ..problem.draw import Draw
from ..problem.op import Inputs, Outputs
from ..problem.paged import layout_of
from .cases import BenchCase
from .chains import Fields, LayerDecode, LayerPrefill, layer_of, part_of
from .stage import Part, Prepared

_PAGE = 64  # of a prefill case's index keys


def storing(inputs: Inputs) -> Callable[[], None]:
    """Quantises the step's new tokens into the caches; of a stage without any it does nothing."""
    if "new_k" not in inputs:
        return lambda: None
    keys, latents, slots = inputs["new_k"], inputs["new_latents"], inputs["slots"]
    nope, rope = latents.split((512, 64), 1)

    def store() -> None:
        functions.store_index_k(keys, slots, inputs["cache"])
        if "kv_cache" in inputs:
            functions.store_kv(nope, rope, slots, inputs["kv_cache"])
        else:
            inputs["kv"][slots, 0] = latents  # a pool of BF16 rows

    return store


def gathering(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """Reads the context's index keys back from their pages; of a stage that has them in a row it gives those."""
    if "context_slots" not in inputs:
        return lambda: (inputs["k"], inputs["k_scale"])
    return lambda: functions.gather_index_k(inputs["cache"], inputs["context_slots"])


class EngineDecode(LayerDecode):
    """A decode step over FP8 caches."""

    name = "engine_decode"

    def parts(self, case: BenchCase) -> Sequence[Part]:
        indexer, _, attention = super().parts(case)
        spec: Fields = {"topk": case["k"], "starts": False, "output": "slots", "page": 1}
        sizes = {"rows": case["batch"] * case["next_n"], "columns": case["context"]}
        return indexer, part_of("select", spec, sizes, "normal"), attention

    def helpers(self, case: BenchCase) -> Sequence[Part]:
        return (*super().helpers(case), *_stores(case, case["batch"] * case["next_n"], "index_k", "v32"))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        drawn = dict(super().inputs(case, draw))
        batch, next_n, context, page = (case[name] for name in ("batch", "next_n", "context", "page"))
        tokens = torch.arange(context, dtype=torch.int32, device=draw.device).expand(batch, -1).contiguous()
        table = slots_of(tokens, drawn["page_table"], page)
        drawn |= _new_tokens(case, draw, batch * next_n)
        drawn |= {"slots": table[:, context - next_n :].flatten().long(), "table": table}
        drawn["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32, device=draw.device) * next_n
        storing(drawn)()
        return drawn

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        q, index_q, lengths, topk = inputs["q"], inputs["index_q"], inputs["lengths"], case["k"]
        flat_q, flat_weights, ends = index_q.flatten(0, 1), inputs["index_weights"].flatten(0, 1), lengths.flatten()
        metadata = deep_gemm.get_paged_mqa_logits_metadata(lengths, case["page"], 1)
        schedule, _ = flash_mla.get_mla_metadata()
        store, attended = storing(inputs), {"softmax_scale": inputs["sm_scale"], "is_fp8_kvcache": True}

        def run() -> tuple[Tensor, Tensor]:
            quantised, weights = functions.quantize_index_q(flat_q, flat_weights)
            store()
            rest = inputs["cache"], weights, lengths, inputs["page_table"], metadata, case["context"]
            logits = deep_gemm.fp8_paged_mqa_logits(quantised.view(index_q.shape), *rest)
            chosen = fast_topk.fast_topk_transform_fused(logits, ends, inputs["table"], inputs["cu_seqlens"], topk)
            slots = chosen.view(*lengths.shape, topk)
            arguments: dict[str, Any] = {**attended, "indices": slots}
            return flash_mla.flash_mla_with_kvcache(q, inputs["kv_cache"], None, None, 512, schedule, **arguments)[0], slots

        return Prepared("ours", run, _named)


class EnginePrefill(LayerPrefill):
    """A prefill step of one sequence: index keys in FP8 pages, latents in a pool of BF16 rows; its pages lie in order."""

    name = "engine_prefill"

    def parts(self, case: BenchCase) -> Sequence[Part]:
        indexer, _, _ = super().parts(case)
        rows = {"rows": case["queries"], "columns": case["context"]}
        attention: Fields = {"heads": case["heads"], "d_qk": case["head_dim"], "topk": case["k"], "max_logits": True}
        sizes = {"queries": case["queries"], "tokens": case["context"]}
        select = part_of("select", {"topk": case["k"], "starts": False}, rows, "normal")
        return indexer, select, part_of("attention", attention, sizes, "random")

    def helpers(self, case: BenchCase) -> Sequence[Part]:
        width = layer_of(case).model.index_head_dim
        gather = part_of(
            "gather_paged", {"layout": "index_k", "width": width, "slots": "i64"}, {"tokens": case["context"]}, "normal"
        )
        return self._quantize(case, case["queries"]), gather, *_stores(case, case["queries"], "index_k")

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        drawn = dict(super().inputs(case, draw))
        queries, context, width = case["queries"], case["context"], layer_of(case).model.index_head_dim
        drawn["context_slots"] = torch.arange(context, device=draw.device)
        drawn["cache"] = layout_of("index_k", _PAGE, width).empty(-(-context // _PAGE), draw.device)
        functions.store_index_k(draw.normal(context, width, dtype=torch.bfloat16), drawn["context_slots"], drawn["cache"])
        drawn |= {**_new_tokens(case, draw, queries), "slots": drawn["context_slots"][context - queries :]}
        storing(drawn)()
        drawn["k"], drawn["k_scale"] = functions.gather_index_k(drawn["cache"], drawn["context_slots"])
        return drawn

    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        q, index_q, index_weights, starts, ends = (inputs[name] for name in ("q", "index_q", "index_weights", "starts", "ends"))
        store, gather, topk = storing(inputs), gathering(inputs), case["k"]

        def run() -> tuple[Tensor, Tensor]:
            quantised, weights = functions.quantize_index_q(index_q, index_weights)
            store()
            logits = deep_gemm.fp8_mqa_logits(quantised, gather(), weights, starts, ends, clean_logits=False)
            chosen = fast_topk.fast_topk_v2(logits, ends, topk)
            out, _, _ = flash_mla.flash_mla_sparse_fwd(q, inputs["kv"], chosen[:, None], inputs["sm_scale"])
            return out, chosen

        return Prepared("ours", run, _named)


def _named(results: tuple[Tensor, Tensor]) -> Outputs:
    return {"out": results[0], "chosen": results[1]}


def _new_tokens(case: BenchCase, draw: Draw, rows: int) -> dict[str, Tensor]:
    """What the projections of the step's tokens gave, norm and position applied."""
    width = layer_of(case).model.index_head_dim
    return {
        "new_k": draw.normal(rows, width, dtype=torch.bfloat16),
        "new_latents": draw.normal(rows, case["head_dim"], dtype=torch.bfloat16, scale=0.1),
    }


def _stores(case: BenchCase, rows: int, *layouts: str) -> Sequence[Part]:
    """The stores of a step."""
    widths = {"index_k": layer_of(case).model.index_head_dim, "v32": 512}
    page = dict(case.shape).get("page", _PAGE)
    return [
        part_of(
            "quantize_paged", {"layout": each, "width": widths[each], "page": page, "slots": "i64"}, {"tokens": rows}, "normal"
        )
        for each in layouts
    ]


ENGINES = (EnginePrefill(), EngineDecode())
