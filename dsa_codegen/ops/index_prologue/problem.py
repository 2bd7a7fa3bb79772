"""From the indexer's projections to what its scores are computed from: norm, rotary, rotation, FP8 and the cache in one.

``k' = LayerNorm(k)`` where there is a norm; rotary position on ``d_rope`` channels of k' and of every head of q, the first or
the last of them; where it is asked for, ``x · H / sqrt(head_dim)`` with the Hadamard matrix of Sylvester's order, which leaves
products as they are and spreads outliers; then e4m3 with a scale per row, as in ``quantize``. k goes into the slots of a paged
cache ("index_k", see ``quantize_paged``: invalid slots are skipped, of rows with one slot the last is stored), q's scale into
``folded = weights · scale · head_dim^-0.5 · heads^-0.5`` (DeepSeek-V3.2-Exp, equation 1). Nothing is rounded in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import channels, checks, compare, paged
from ...problem.caches import IndexKLayout, last_of_each, tokens_of, valid_slots
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import Model
from ...problem.quantization import quantize_groups
from ...problem.values import Spec
from .. import rotated
from ..quantize.problem import WEIGHTS
from ..rows import RowSizes, as_bytes, check_rows

_WEIGHT_NAMES = {dtype: name for name, dtype in WEIGHTS.items()}
_ALIGNMENT = 16  # elements; rows are read 16 bytes at a time
NO_NORM = "none"


@dataclass(frozen=True)
class IndexPrologueSpec(Spec):
    """What changes the code."""

    heads: int
    """Heads of the queries; 0 for keys alone, as a step wants them that scores nothing."""
    head_dim: int
    d_rope: int = 64
    rotary: str = "half_split"
    """How channels are paired: "half_split" or "interleaved"."""
    rope_first: bool = True
    """Whether the rotary channels are the first ones of a row, or the last."""
    hadamard: bool = False
    norm: str = "fp32"
    """Dtype of the LayerNorm's weight and bias; "none" for keys that come normalised."""
    weights: str = "fp32"
    power_of_two: bool = False
    page: int = 64
    slots: str = "i64"
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 0, channels.MOST_INDEX_HEADS)
        self.require_in("head_dim", paged.WIDTHS["index_k"])
        self.require_in("d_rope", [width for width in (0, *rotated.D_ROPES) if width <= self.head_dim])
        powers = self.head_dim & (self.head_dim - 1) == 0  # of two: Hadamard matrices of Sylvester's order
        self.require_in("hadamard", (False, True) if powers else (False,))
        self.require_in("rotary", rotated.STYLES)
        self.require_in("norm", (NO_NORM, *rotated.NORM_DTYPES))
        self.require_in("weights", WEIGHTS)
        self.require_range("page", 1, 1024)
        self.require_in("slots", paged.SLOTS)

    @property
    def cache(self) -> IndexKLayout:
        """How a block of the cache is laid out."""
        return IndexKLayout(self.page, self.head_dim)

    @property
    def weight_factor(self) -> float:
        """What a folded weight is multiplied by besides its query's scale."""
        return float((max(self.heads, 1) * self.head_dim) ** -0.5)


@dataclass(frozen=True)
class IndexPrologueSizes(RowSizes):
    """What varies from call to call."""

    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (17, 513)}


class IndexPrologueProblem(Problem[IndexPrologueSpec, IndexPrologueSizes]):
    """See the module's first lines."""

    name = "index_prologue"
    summary = "The indexer's norm, rotary position, rotation and FP8; keys stored to the slots of a paged cache."
    function = "index_prologue"
    schema = (
        "(Tensor q, Tensor weights, Tensor k, Tensor? norm_weight, Tensor? norm_bias, Tensor? cos_sin, Tensor? positions, "
        "Tensor slots, Tensor(a!) cache, float eps=1e-6, str rotary='half_split', bool rope_first=True, bool hadamard=False, "
        "bool power_of_two=False, bool batch_invariant=False) -> (Tensor, Tensor)"
    )
    spec_type = IndexPrologueSpec
    sizes_type = IndexPrologueSizes
    minor = frozenset({"d_rope", "rotary", "rope_first", "norm", "weights", "power_of_two", "page", "slots", "batch_invariant"})

    def specs_of(self, model: Model) -> Sequence[IndexPrologueSpec]:
        head_dim = model.index_head_dim
        options: dict[str, Any] = {"page": model.page, "batch_invariant": model.invariant}
        return (IndexPrologueSpec(model.index_heads, head_dim, d_rope=_rotary(model), **options),)

    def bind(self, *args: Any) -> tuple[IndexPrologueSpec, IndexPrologueSizes, Inputs]:
        q, weights, k, norm_weight, norm_bias, cos_sin, positions, slots, cache, eps, rotary, first, *rest = args
        hadamard, rounded, invariant = rest
        q = checks.tensor("q", q, (None, None, None), torch.bfloat16, inner_contiguous=True)
        tokens, heads, head_dim = q.shape
        _check_heads(q)
        weights = checks.tensor("weights", weights, (tokens, heads), tuple(WEIGHTS.values()), like=q, inner_contiguous=True)
        k = check_rows("k", k, q)
        if k.shape != (tokens, head_dim):
            raise InputError("k", f"shape {list(k.shape)}", f"shape {[tokens, head_dim]}")
        norm_weight, norm_bias, norm = _check_norm(norm_weight, norm_bias, head_dim, q)
        cos_sin, positions = rotated.check_positions(cos_sin, positions, tokens, q)
        slots = paged.check_slots(slots, tokens, q)
        page = paged.check_cache("cache", cache, head_dim + 4, like=q)
        checks.one_of("rotary", rotary, rotated.STYLES)
        spec = IndexPrologueSpec(
            heads,
            head_dim,
            0 if cos_sin is None else cos_sin.shape[1],
            rotary,
            first,
            hadamard,
            norm,
            _WEIGHT_NAMES[weights.dtype],
            rounded,
            page,
            paged.SLOT_NAMES[slots.dtype],
            invariant,
        )
        tensors = {"q": q, "weights": weights, "k": k, "norm_weight": norm_weight, "norm_bias": norm_bias}
        placed = {"cos_sin": cos_sin, "positions": positions, "slots": slots, "cache": cache, "eps": rotated.check_eps(eps)}
        return spec, IndexPrologueSizes(tokens), {**tensors, **placed}

    def inputs(self, spec: IndexPrologueSpec, case: Case[IndexPrologueSizes], draw: Draw) -> Inputs:
        tokens, width = case.sizes.tokens, spec.head_dim
        blocks = tokens // spec.page + 2  # the last block is named by no slot
        norm = {name: _draw_norm(spec, draw) for name in ("norm_weight", "norm_bias")}
        cos_sin, positions = rotated.draw_positions(draw, tokens, spec.d_rope)
        return {
            "q": rotated.draw_rows(draw, tokens, spec.heads, width),
            "weights": draw.normal(tokens, spec.heads, dtype=WEIGHTS[spec.weights]),
            "k": rotated.draw_rows(draw, tokens, width),
            **norm,
            "cos_sin": cos_sin,
            "positions": positions,
            "slots": paged.draw_slots(draw, tokens, blocks, spec.page, spec.slots, case.distribution == "repeated"),
            "cache": spec.cache.empty(blocks, draw.device),
            "eps": 1e-6,
        }

    def reference(self, spec: IndexPrologueSpec, inputs: Inputs) -> Outputs:
        q, k = _exact(spec, inputs)
        values, scales = quantize_groups(q, spec.head_dim, spec.power_of_two)
        folded = inputs["weights"].float() * scales[..., 0] * spec.weight_factor
        cache = inputs["cache"].clone()
        keys, key_scales = quantize_groups(k, spec.head_dim, spec.power_of_two)
        spec.cache.pack(cache, inputs["slots"], keys, key_scales[:, 0])
        return {"values": values, "folded": folded, "cache": cache}

    def allocate(self, spec: IndexPrologueSpec, inputs: Inputs) -> Outputs:
        q = inputs["q"]
        values = torch.empty(q.shape, dtype=checks.FP8, device=q.device)
        folded = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        return {"values": values, "folded": folded, "cache": inputs["cache"]}

    def check(self, spec: IndexPrologueSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        q, k = _exact(spec, inputs)
        weights = inputs["weights"].float() * spec.weight_factor
        # A weight of zero hides the scale: that of the exact row then.
        scales = torch.where(
            weights == 0, quantize_groups(q, spec.head_dim, spec.power_of_two)[1][..., 0], outputs["folded"] / weights
        )
        rounded = spec.head_dim, spec.power_of_two
        queries = rotated.compare_quantised(
            "values", outputs["values"].flatten(0, 1), scales.view(-1, 1), q.flatten(0, 1), *rounded
        )
        return compare.worst(queries, _compare_cache(spec, inputs["slots"], outputs["cache"], k))

    def cost(self, spec: IndexPrologueSpec, case: Case[IndexPrologueSizes]) -> Cost:
        tokens, rows = case.sizes.tokens, spec.heads + 1
        per_token = 3 * rows * spec.head_dim + spec.heads * (4 + WEIGHTS[spec.weights].itemsize) + 4 * spec.d_rope + 20
        turns = 2 * spec.head_dim.bit_length() if spec.hadamard else 0
        return Cost((8.0 + turns) * tokens * rows * spec.head_dim, tokens * per_token, "fp32")

    def cases(self, spec: IndexPrologueSpec) -> Sequence[Case[IndexPrologueSizes]]:
        return [*(Case(IndexPrologueSizes(tokens)) for tokens in (3, 1, 0)), Case(IndexPrologueSizes(9), "repeated")]

    def long_cases(self, spec: IndexPrologueSpec) -> Sequence[Case[IndexPrologueSizes]]:
        return [Case(IndexPrologueSizes(tokens), "repeated") for tokens in (1000, 9000)]

    def options(self, spec: IndexPrologueSpec) -> Sequence[IndexPrologueSpec]:
        powers = spec.head_dim & (spec.head_dim - 1) == 0
        turned = replace(spec, rotary="interleaved", rope_first=False, hadamard=powers, norm="bf16", weights="bf16")
        few = min(32, spec.d_rope)
        keys = replace(spec, heads=0, norm="bf16")
        return (
            spec,
            replace(turned, power_of_two=True, slots="i32"),
            replace(spec, norm=NO_NORM, hadamard=powers, d_rope=few),
            keys,
        )

    def workloads(self, spec: IndexPrologueSpec) -> Sequence[Case[IndexPrologueSizes]]:
        return [Case(IndexPrologueSizes(tokens)) for tokens in (4096, 64, 1)]


def _rotary(model: Model) -> int:
    """Rotary channels of the indexer: as many as a token of the model has, 64 of models that have none, as far as they fit."""
    return min(model.d_rope or paged.D_ROPE, model.index_head_dim // 16 * 16)


def _check_heads(q: Tensor) -> None:
    """A token's heads lie one behind the other; tokens may lie apart, where q is a part of a wider projection."""
    tokens, heads, width = q.shape
    if (heads > 1 and q.stride(1) != width) or (tokens > 1 and heads and q.stride(0) % _ALIGNMENT):
        raise InputError("q", f"strides {q.stride()}", f"heads {width} elements apart, tokens a multiple of {_ALIGNMENT}")


def _check_norm(weight: Any, bias: Any, width: int, like: Tensor) -> tuple[Tensor | None, Tensor | None, str]:
    """(weight, bias, the name of their dtype)."""
    if weight is None and bias is None:
        return None, None, NO_NORM
    dtypes = tuple(rotated.NORM_DTYPES.values())
    weight = checks.tensor("norm_weight", weight, (width,), dtypes, like=like)
    return weight, checks.tensor("norm_bias", bias, (width,), weight.dtype, like=like), rotated.NORM_NAMES[weight.dtype]


def _draw_norm(spec: IndexPrologueSpec, draw: Draw) -> Tensor | None:
    return None if spec.norm == NO_NORM else draw.normal(spec.head_dim, dtype=rotated.NORM_DTYPES[spec.norm])


def _exact(spec: IndexPrologueSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """fp32 q [tokens, heads, head_dim] and k [tokens, head_dim] before they are quantised."""
    k = inputs["k"].float()
    if inputs["norm_weight"] is not None:
        weight, bias = inputs["norm_weight"].float(), inputs["norm_bias"].float()
        k = torch.nn.functional.layer_norm(k, k.shape[-1:], weight, bias, inputs["eps"])
    return _turned(spec, inputs, inputs["q"].float()), _turned(spec, inputs, k)


def _turned(spec: IndexPrologueSpec, inputs: Inputs, x: Tensor) -> Tensor:
    """Rotary position, and the rotation where it is asked for."""
    where = spec.d_rope if spec.rope_first else spec.head_dim - spec.d_rope
    parts = list(x.split((where, spec.head_dim - where), -1))
    which = 0 if spec.rope_first else 1
    if spec.d_rope:
        parts[which] = rotated.rotate(parts[which], inputs["cos_sin"], inputs["positions"], spec.rotary)
    x = torch.cat(parts, -1)
    if spec.hadamard and spec.batch_invariant:
        return _hadamard(x)
    return x @ hadamard_matrix(spec.head_dim, x.device) if spec.hadamard else x


def _hadamard(x: Tensor) -> Tensor:
    """``x @ hadamard_matrix`` by sums and differences of pairs, whose order no other row decides."""
    width, whole = x.shape[-1], x.shape
    for bit in range(width.bit_length() - 1):
        low, high = x.reshape(*whole[:-1], -1, 2, 1 << bit).unbind(-2)
        x = torch.stack((low + high, low - high), -2)
    return x.reshape(whole) * float(width**-0.5)


def hadamard_matrix(width: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [width, width], Sylvester's order, divided by sqrt(width); ``width`` is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * width**-0.5


def _compare_cache(spec: IndexPrologueSpec, slots: Tensor, cache: Tensor, exact: Tensor) -> Accuracy:
    """What lies at the slots is the last row of each, and around them the cache is as it was: one byte everywhere."""
    layout = spec.cache
    stored = last_of_each(slots, valid_slots(slots, tokens_of(layout, cache)))
    keys, scales = layout.unpack(cache, slots[stored])
    expected = torch.full_like(cache, int(cache[-1].flatten()[-1]))
    layout.pack(expected, slots[stored], keys, scales)
    rounded = rotated.compare_quantised("cache", keys, scales[:, None], exact[stored], spec.head_dim, spec.power_of_two)
    return compare.worst(rounded, compare.equal("cache", as_bytes(cache), as_bytes(expected)))
