"""BF16 -> flat FP8: rows with a scale each (index keys, attention's queries and tokens), or the indexer's queries, with their
scales folded into its weights.

A row with largest magnitude ``a`` becomes e4m3 values times the fp32 scale ``max(a, 1e-4) / 448`` (``power_of_two``: the next
power of two). ``folded = weights · scale · d^-0.5 · heads^-0.5``, so that the indexer's logits need no scale of the queries
(DeepSeek-V3.2-Exp, equation 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...problem import channels, checks, quantization
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import Model
from ...problem.values import Spec
from ..rows import RowSizes, check_rows, draw_rows, same_bytes

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WEIGHT_NAMES = {dtype: name for name, dtype in WEIGHTS.items()}


@dataclass(frozen=True)
class QuantizeSpec(Spec):
    """What changes the code."""

    width: int
    """Channels of a row: head_dim of the indexer; without weights also those of attention's queries and tokens."""
    heads: int = 1
    """Heads of the queries; 1 for keys."""
    weights: str = "none"
    """Dtype of the weights that the queries' scales are folded into; "none" for keys, whose scales are returned."""
    power_of_two: bool = False
    """Whether scales are rounded up to powers of two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("width", channels.ROW_WIDTHS if self.weights == "none" else channels.INDEX_WIDTHS)
        self.require_in("weights", ("none", *WEIGHTS))
        self.require_range("heads", 1, 1 if self.weights == "none" else channels.MOST_INDEX_HEADS)


@dataclass(frozen=True)
class QuantizeSizes(RowSizes):
    """What varies from call to call."""

    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (513,)}


class QuantizeProblem(Problem[QuantizeSpec, QuantizeSizes]):
    """See the module's first lines."""

    name = "quantize"
    summary = "BF16 keys to e4m3 with a scale each, or queries to e4m3 with their scales folded into the indexer's weights."
    function = "quantize"
    schema = "(Tensor source, Tensor? weights=None, bool power_of_two=False) -> (Tensor, Tensor)"
    spec_type = QuantizeSpec
    sizes_type = QuantizeSizes
    minor = frozenset({"power_of_two", "weights"})

    def specs_of(self, model: Model) -> Sequence[QuantizeSpec]:
        return (QuantizeSpec(model.index_head_dim, model.index_heads, "fp32"), QuantizeSpec(model.index_head_dim))

    def bind(self, *args: Any) -> tuple[QuantizeSpec, QuantizeSizes, Inputs]:
        source, weights, power_of_two = args
        if weights is None:
            source = check_rows("source", source)
            tokens, width = source.shape
            return QuantizeSpec(width, power_of_two=power_of_two), QuantizeSizes(tokens), {"source": source}
        source = checks.rows("source", source, (None, None, None), torch.bfloat16)
        tokens, heads, width = source.shape
        weights = checks.rows("weights", weights, (tokens, heads), tuple(WEIGHTS.values()), like=source, whole=False)
        spec = QuantizeSpec(width, heads, _WEIGHT_NAMES[weights.dtype], power_of_two)
        return spec, QuantizeSizes(tokens), {"source": source, "weights": weights}

    def inputs(self, spec: QuantizeSpec, case: Case[QuantizeSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        if spec.weights == "none":
            return {"source": draw_rows(draw, tokens, spec.width)}
        source = draw_rows(draw, tokens, spec.heads, spec.width)
        return {"source": source, "weights": draw.normal(tokens, spec.heads, dtype=WEIGHTS[spec.weights])}

    def reference(self, spec: QuantizeSpec, inputs: Inputs) -> Outputs:
        values, scales = quantization.quantize_groups(inputs["source"], spec.width, spec.power_of_two)
        if spec.weights == "none":
            return {"values": values, "scales": scales[..., 0]}
        return {"values": values, "folded": inputs["weights"].float() * scales[..., 0] * weight_factor(spec)}

    def allocate(self, spec: QuantizeSpec, inputs: Inputs) -> Outputs:
        source = inputs["source"]
        values = torch.empty(source.shape, dtype=checks.FP8, device=source.device)
        per_row = torch.empty(source.shape[:-1], dtype=torch.float32, device=source.device)
        return {"values": values, "scales" if spec.weights == "none" else "folded": per_row}

    def check(self, spec: QuantizeSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return same_bytes(outputs, reference)

    def cost(self, spec: QuantizeSpec, case: Case[QuantizeSizes]) -> Cost:
        rows = case.sizes.tokens * spec.heads
        weights = 0 if spec.weights == "none" else WEIGHTS[spec.weights].itemsize
        return Cost(3.0 * rows * spec.width, rows * (3 * spec.width + 4 + weights), "fp32")

    def cases(self, spec: QuantizeSpec) -> Sequence[Case[QuantizeSizes]]:
        return [Case(QuantizeSizes(tokens)) for tokens in (37, 1, 66, 0)]

    def options(self, spec: QuantizeSpec) -> Sequence[QuantizeSpec]:
        other: dict[str, Any] = {} if spec.weights == "none" else {"weights": "bf16"}
        return (spec, replace(spec, power_of_two=True, **other))

    def workloads(self, spec: QuantizeSpec) -> Sequence[Case[QuantizeSizes]]:
        return [Case(QuantizeSizes(tokens)) for tokens in (4096, 64)]


def weight_factor(spec: QuantizeSpec) -> float:
    """What a folded weight is multiplied by besides its query's scale: heads^-0.5 · d^-0.5."""
    return float((spec.heads * spec.width) ** -0.5)
