"""The stages before the scores: what lies between a layer's projections and its caches, for the indexer and for the latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import functions, ops
from ..problem import compare
from ..problem.draw import Draw
from ..problem.op import Accuracy, Inputs, Outputs
from ..problem.values import Sizes, Spec
from .cases import BenchCase
from .stages import OpStage

_UNFUSED = compare.Limit(similarity=2e-3)
"""Of who rounds to BF16 between the steps and then to e4m3: other neighbours, here and there."""

_INDEX = ("q", "weights", "k", "norm_weight", "norm_bias", "cos_sin", "positions", "slots", "cache")
_LATENT = ("latent", "norm_weight", "cos_sin", "positions", "slots", "cache")


class _PrologueStage(OpStage):
    """Every row has a slot of its own, as in serving; an operation's own cases leave some out."""

    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        drawn = super().inputs(case, draw)
        slots = draw.permutation((len(drawn["cache"]) - 1) * case["page"])[: case["tokens"]]
        return {**drawn, "slots": slots}


class IndexPrologueStage(_PrologueStage):
    """A peer is judged by the queries with their scales: it may store keys as it likes."""

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        if exact:
            return super().check(case, inputs, {**outputs, "cache": inputs["cache"]}, reference, exact)
        return compare.close("queries", _weighted(outputs), _weighted(reference), _UNFUSED)


class LatentPrologueStage(_PrologueStage):
    """A peer is judged by what a gather reads back."""

    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        if exact:
            return super().check(case, inputs, outputs, reference, exact)
        found, expected = (functions.gather_kv(each["cache"], inputs["slots"]) for each in (outputs, reference))
        return compare.close("latents", found, expected, _UNFUSED)


def _weighted(outputs: Outputs) -> Tensor:
    """Queries times their folded weights, which hold the scales."""
    return outputs["values"].float() * outputs["folded"][..., None]


def index_prologue_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    """DeepSeek-V3.2's: half-split rotary on the first 64 channels, no rotation, fp32 weights."""
    op = ops.get("index_prologue")
    return op.spec_type(**{name: case[name] for name in ("heads", "head_dim", "page")}), op.sizes_type(
        **{"tokens": case["tokens"]}
    )


def latent_prologue_spec(case: BenchCase) -> tuple[Spec, Sizes]:
    """DeepSeek-V3.2's: a norm of the 512 channels, interleaved rotary on 64."""
    op = ops.get("latent_prologue")
    spec: dict[str, Any] = {"layout": "v32", "width": 512, "norm": "nope", "page": case["page"]}
    return op.spec_type(**spec), op.sizes_type(**{"tokens": case["tokens"]})


def _index(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    args = [
        inputs[name] for name in ["q", "weights", "k", "norm_weight", "norm_bias", "cos_sin", "positions", "slots", "cache"]
    ]
    return lambda: functions.index_prologue(*args)


def _latent(case: BenchCase, inputs: Inputs) -> Callable[[], Any]:
    args = [inputs[name] for name in _LATENT]

    def run() -> Tensor:
        functions.store_latent(*args)
        return inputs["cache"]

    return run


PROLOGUES = (
    IndexPrologueStage("index_prologue", "index_prologue", index_prologue_spec, _index, "values", "folded"),
    LatentPrologueStage("latent_prologue", "latent_prologue", latent_prologue_spec, _latent, "cache"),
)
