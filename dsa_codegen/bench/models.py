"""The stages of models whose shapes differ from DeepSeek-V3.2's: other latents, BF16 or other rows, sinks, pooled keys.

A case's distribution is the preset's name. Lists are random; of pooled keys they are random blocks and the tokens behind the
last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functions, ops
from ..problem import presets
from ..problem.draw import Draw
from ..problem.op import Case, Inputs
from ..problem.presets import Model
from ..problem.values import Sizes, Spec
from .cases import BenchCase
from .stage import Part
from .stages import OpStage


def model_of(case: BenchCase) -> Model:
    """The preset whose shape a case has."""
    return presets.preset(case.distribution)


class ModelStage(OpStage):
    """Attention of a preset, with the spec that serving it calls."""

    def part(self, case: BenchCase) -> Part:
        spec, sizes = self._stated(case)
        return Part(self.op, spec, Case(sizes, "random"))

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        inputs, model = super().inputs(case, draw), model_of(case)
        if model.pool == 1:
            return inputs
        lists, lengths = blocks_and_tail(draw, case["queries"], case["context"], model)
        return {**inputs, "indices": lists[:, None], "lengths": lengths}


def blocks_and_tail(draw: Draw, queries: int, context: int, model: Model) -> tuple[Tensor, Tensor]:
    """int32 [queries, entries] and [queries]: what the last queries of a context choose by pooled keys.

    Random blocks that lie before a query as a whole, then the tokens of its own block up to itself; -1 behind them.
    """
    pool, blocks = model.pool, model.topk // model.pool
    seen = torch.arange(context - queries + 1, context + 1, device=draw.device)[:, None]
    whole, number = seen // pool, torch.arange(context // pool, device=draw.device)
    ranks = draw.uniform(queries, len(number)).masked_fill(number >= whole, -1.0)
    chosen = ranks.topk(min(blocks, len(number)), dim=1)
    listed = torch.where(chosen.values >= 0, chosen.indices, context)[:, :, None] * pool
    before = (listed + torch.arange(pool, device=draw.device)).flatten(1).sort(dim=1).values
    tail = whole * pool + torch.arange(pool - 1, device=draw.device)
    lists = torch.cat((before, tail.where(tail < seen, context)), 1)
    lists = lists.masked_fill(lists >= context, -1).int()
    lists = torch.nn.functional.pad(lists, (0, model.entries - lists.shape[1]), value=-1)
    return lists, (lists.shape[1] - lists.flip(1).ge(0).int().argmax(1)).int()


def _prefill_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("attention")
    (spec,) = op.specs(model_of(case))
    return spec, op.sizes_type(**{"queries": case["queries"], "tokens": case["context"]})


def _decode_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    op = ops.get("attention_paged")
    (spec,) = op.specs(model_of(case))
    batch, next_n = case["batch"], case["next_n"]
    return spec, op.sizes_type(**{"batch": batch, "next_n": next_n, "tokens": batch * case["context"]})


def _prefill(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x, d_v = inputs, model_of(case).d_v
    given, options = (x["q"], x["kv"], x["indices"], x["sm_scale"]), {"lengths": x["lengths"], "sink": x["sink"]}
    return lambda: functions.sparse_attention(*given, d_v=d_v, **options)


def _decode(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    x, model = inputs, model_of(case)
    given, sink = (x["q"], x["cache"], x["indices"], x["sm_scale"]), x["sink"]
    return lambda: functions.sparse_attention_paged(*given, sink=sink, layout=model.kv_layout, d_v=model.d_v)


MODELS = (
    ModelStage("model_prefill", "attention", _prefill_spec, _prefill, "out", "lse"),
    ModelStage("model_decode", "attention_paged", _decode_spec, _decode, "out", "lse"),
)
