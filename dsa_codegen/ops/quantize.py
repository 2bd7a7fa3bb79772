"""BF16 -> flat FP8: index keys with a scale per token, or the indexer's queries with their scales folded into its weights.

A row with largest magnitude ``a`` becomes e4m3 values times the fp32 scale ``max(a, 1e-4) / 448`` (``power_of_two``: the next
power of two). ``folded = weights · scale · d^-0.5 · heads^-0.5``, so that the indexer's logits need no scale of the queries
(DeepSeek-V3.2-Exp, equation 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import caches, checks, compare
from ..draw import Draw
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..presets import Model
from ..values import Scalar, Sizes, Spec

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WEIGHT_NAMES = {dtype: name for name, dtype in WEIGHTS.items()}
ROW_PARAMETERS = (
    Parameter("block_t", (1, 2, 4, 8, 16, 32, 64), "rows per block"),
    Parameter("num_warps", (1, 2, 4, 8), "warps per block"),
)
"""What there is to tune where a block works on rows, each by itself: here and in the operations on paged caches."""
_ROW_ALIGNMENT = 16  # elements; rows are read 16 bytes at a time


@dataclass(frozen=True)
class QuantizeSpec(Spec):
    """What changes the code."""

    width: int
    """Channels of a row: head_dim of the indexer."""
    heads: int = 1
    """Heads of the queries; 1 for keys."""
    weights: str = "none"
    """Dtype of the weights that the queries' scales are folded into; "none" for keys, whose scales are returned."""
    power_of_two: bool = False
    """Whether scales are rounded up to powers of two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("width", (32, 64, 128))
        self.require_in("weights", ("none", *WEIGHTS))
        self.require_in("heads", (1,) if self.weights == "none" else (8, 16, 32, 64))


@dataclass(frozen=True)
class QuantizeSizes(Sizes):
    """What varies from call to call."""

    tokens: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (513,)}


class Quantize(Op[QuantizeSpec, QuantizeSizes]):
    """See the module's first lines."""

    name = "quantize"
    summary = "BF16 keys to e4m3 with a scale each, or queries to e4m3 with their scales folded into the indexer's weights."
    function = "quantize"
    schema = "(Tensor source, Tensor? weights=None, bool power_of_two=False) -> (Tensor, Tensor)"
    spec_type = QuantizeSpec
    sizes_type = QuantizeSizes
    backends = ("triton",)
    minor = frozenset({"power_of_two", "weights"})
    min_capability = 89

    def specs(self, model: Model) -> Sequence[QuantizeSpec]:
        return (QuantizeSpec(model.index_head_dim, model.index_heads, "fp32"), QuantizeSpec(model.index_head_dim))

    def bind(self, *args: Any) -> tuple[QuantizeSpec, QuantizeSizes, Inputs]:
        source, weights, power_of_two = args
        if weights is None:
            tokens, width = check_rows("source", source).shape
            return QuantizeSpec(width, power_of_two=power_of_two), QuantizeSizes(tokens), {"source": source}
        tokens, heads, width = checks.tensor("source", source, (None, None, None), torch.bfloat16).shape
        checks.tensor("weights", weights, (tokens, heads), tuple(WEIGHTS.values()), like=source)
        spec = QuantizeSpec(width, heads, _WEIGHT_NAMES[weights.dtype], power_of_two)
        return spec, QuantizeSizes(tokens), {"source": source, "weights": weights}

    def inputs(self, spec: QuantizeSpec, case: Case[QuantizeSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        if spec.weights == "none":
            return {"source": draw_rows(draw, tokens, spec.width)}
        source = draw_rows(draw, tokens, spec.heads, spec.width)
        return {"source": source, "weights": draw.normal(tokens, spec.heads, dtype=WEIGHTS[spec.weights])}

    def reference(self, spec: QuantizeSpec, inputs: Inputs) -> Outputs:
        values, scales = caches.quantize_groups(inputs["source"], spec.width, spec.power_of_two)
        if spec.weights == "none":
            return {"values": values, "scales": scales[..., 0]}
        return {"values": values, "folded": inputs["weights"].float() * scales[..., 0] * _weight_factor(spec)}

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

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return ROW_PARAMETERS

    def constraints(self, spec: QuantizeSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from values_per_thread(config, spec.width)

    def guesses(self, spec: QuantizeSpec, sizes: QuantizeSizes, gpu: Gpu) -> Iterable[Config]:
        # 16 values, 32 bytes of bf16, per thread; few rows are spread over more, smaller blocks.
        if sizes.tokens * spec.heads < 8 * gpu.sms:
            yield Config.of("triton", block_t=1, num_warps=1)
        else:
            yield Config.of("triton", block_t=16, num_warps=4)

    def derived(self, spec: QuantizeSpec, config: Config) -> dict[str, Scalar]:
        return {**limits(), "weight_factor": repr(_weight_factor(spec))}

    def launches(self, spec: QuantizeSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        rows = inputs["source"].shape[0] * spec.heads
        if not rows:
            return ()
        stride = inputs["source"].stride(0) if spec.heads == 1 else spec.width
        args = (*inputs.values(), *outputs.values(), rows, stride)
        return (Launch("quantize", (-(-rows // config["block_t"]), 1, 1), args),)


def check_rows(name: str, rows: object, like: Tensor | None = None) -> Tensor:
    """Check bf16 rows [tokens, channels], possibly a part of wider ones."""
    rows = checks.tensor(name, rows, (None, None), torch.bfloat16, like=like, inner_contiguous=True)
    if rows.shape[0] > 1 and rows.stride(0) % _ROW_ALIGNMENT:
        raise InputError(name, f"rows {rows.stride(0)} elements apart", f"a multiple of {_ROW_ALIGNMENT} elements")
    return rows


def draw_rows(draw: Draw, tokens: int, *shape: int) -> Tensor:
    """bf16 rows of very different magnitudes; some of zeros, below the smallest scale, and near the largest number."""
    rows = draw.normal(tokens, *shape) * draw.normal(tokens, *(1 for _ in shape), scale=4.0).exp()
    if tokens > 3:
        rows[1] = 0
        rows[2] *= 1e-9
        rows[3, ..., 0] = 3e38
    return rows.bfloat16()


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for exact comparison."""
    return tensor.contiguous().view(torch.uint8)


def same_bytes(outputs: Outputs, reference: Outputs) -> Accuracy:
    """Whether every output agrees with the reference bit for bit, NaNs and the sign of zero included."""
    return compare.worst(*(compare.equal(name, as_bytes(outputs[name]), as_bytes(reference[name])) for name in reference))


def values_per_thread(config: Config, width: int) -> Iterable[Violation]:
    """A row's values, exact and quantised, lie in registers together with their addresses."""
    yield from exceeds("values per thread", config["block_t"] * width / (32 * config["num_warps"]), 32)


def limits() -> dict[str, Scalar]:
    """The constants of the quantisation, for templates."""
    return {"e4m3_max": repr(caches.E4M3_MAX), "smallest_amax": repr(caches.SMALLEST_AMAX)}


def _weight_factor(spec: QuantizeSpec) -> float:
    return float((spec.heads * spec.width) ** -0.5)


OP = Quantize()
