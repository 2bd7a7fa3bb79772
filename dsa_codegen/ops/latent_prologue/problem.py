"""From the projection of the latents to the KV cache: RMSNorm where there is one, rotary position, FP8 or BF16, the slots.

A row is ``d_nope`` channels and then ``d_rope`` rotary ones (none perhaps), as the down projection gives them.
``x / sqrt(mean(x²) + eps) · norm_weight`` is taken over the first ones ("nope": DeepSeek-V3.2) or over all ("latent": V4), as
far as norm_weight reaches. The caches are those of ``quantize_paged``, quantised as it does it, or "bf16": rows as they are.
Invalid slots are skipped; of rows with one slot the last is stored, whole. Nothing is rounded in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, compare, paged
from ...problem.caches import last_of_each, valid_slots
from ...problem.draw import Draw
from ...problem.kv_layouts import KV_LAYOUTS, AnyKvLayout, KvPlainLayout, kv_layout
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ...problem.values import Spec
from .. import rotated
from ..rows import RowSizes, as_bytes, check_rows

PLAIN = "bf16"
_BF16 = compare.Limit(similarity=5e-6, absolute=1e-4, relative=2.0**-8)


@dataclass(frozen=True)
class LatentPrologueSpec(Spec):
    """What changes the code."""

    layout: str
    width: int
    """Channels without position: d_nope."""
    rotary: str = "interleaved"
    """How channels are paired: "interleaved" or "half_split"."""
    norm: str = "none"
    """Channels that the RMSNorm takes together: "none", "nope" or "latent"."""
    norm_weight: str = "fp32"
    """Dtype of the norm's weight."""
    power_of_two: bool = False
    page: int = 64
    slots: str = "i64"
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""
    d_rope: int = paged.D_ROPE
    """Channels with rotary position, the last ones; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("layout", KV_LAYOUTS)
        self.require_in("width", paged.WIDTHS[self.layout])
        self.require_in("d_rope", paged.ROPES[self.layout])
        self.require_in("rotary", rotated.STYLES)
        self.require_in("norm", ("none", "nope", "latent"))
        self.require_in("norm_weight", rotated.NORM_DTYPES)
        self.require_in("power_of_two", self.roundings)
        self.require_range("page", 1, 1024)
        self.require_in("slots", paged.SLOTS)

    @property
    def roundings(self) -> tuple[bool, ...]:
        """What ``power_of_two`` may be."""
        return paged.roundings(self.cache)

    @property
    def cache(self) -> AnyKvLayout:
        """How a block of the cache is laid out."""
        return kv_layout(self.layout, self.page, self.width, self.d_rope)

    @property
    def normalised(self) -> int:
        """Channels that the norm takes together."""
        return {"none": 0, "nope": self.width, "latent": self.width + self.d_rope}[self.norm]


@dataclass(frozen=True)
class LatentPrologueSizes(RowSizes):
    """What varies from call to call."""

    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (513,)}


class LatentPrologueProblem(Problem[LatentPrologueSpec, LatentPrologueSizes]):
    """See the module's first lines."""

    name = "latent_prologue"
    summary = "Norm, rotary position and FP8 of latent vectors, stored to the slots of a paged KV cache."
    function = "store_latent"
    schema = (
        "(Tensor latent, Tensor? norm_weight, Tensor? cos_sin, Tensor? positions, Tensor slots, Tensor(a!) cache, "
        "float eps=1e-6, str layout='v32', str rotary='interleaved', bool power_of_two=False, "
        "bool batch_invariant=False, float scale=1.0) -> ()"
    )
    spec_type = LatentPrologueSpec
    sizes_type = LatentPrologueSizes
    minor = frozenset({"rotary", "norm", "norm_weight", "power_of_two", "page", "slots", "batch_invariant"})

    def specs_of(self, model: Model) -> Sequence[LatentPrologueSpec]:
        of: dict[str, Any] = {"page": model.page, "batch_invariant": model.invariant, "d_rope": model.d_rope}
        if model.kv_layout == NO_CACHE:
            return (LatentPrologueSpec(PLAIN, model.d_nope, norm="nope", **of),)
        norm = "latent" if model.rope_in_value else "nope"
        rounded = paged.scales_of(model.cache) == "e8m0"
        return (LatentPrologueSpec(model.kv_layout, model.d_nope, norm=norm, power_of_two=rounded, **of),)

    def bind(self, *args: Any) -> tuple[LatentPrologueSpec, LatentPrologueSizes, Inputs]:
        latent, norm_weight, cos_sin, positions, slots, cache, eps, layout, rotary, *rest = args
        power_of_two, invariant, scale = rest
        checks.one_of("layout", layout, KV_LAYOUTS)
        latent = check_rows("latent", latent)
        tokens, whole = latent.shape
        cos_sin, positions = rotated.check_positions(cos_sin, positions, tokens, latent)
        d_rope = 0 if cos_sin is None else cos_sin.shape[1]
        if d_rope not in paged.ROPES[layout]:
            raise InputError("cos_sin", f"{d_rope} columns", " or ".join(map(str, paged.ROPES[layout])))
        width = whole - d_rope
        if width not in paged.WIDTHS[layout]:
            behind = f"and {d_rope} rotary ones in a cache of layout {layout!r}"
            raise InputError("latent", f"{whole} channels", f"{paged.widths(layout)} {behind}")
        norm, dtype = _check_norm(norm_weight, width, d_rope, latent)
        slots = paged.check_slots(slots, tokens, latent)
        known = kv_layout(layout, 1, width, d_rope)
        if layout == PLAIN:
            page = paged.check_plain_rows("cache", cache, whole, torch.bfloat16, latent)
        else:
            page = paged.check_cache("cache", cache, known.bytes_per_token, like=latent)
        checks.one_of("rotary", rotary, rotated.STYLES)
        rounded = power_of_two or paged.scales_of(known) == "e8m0"
        placed = page, paged.SLOT_NAMES[slots.dtype]
        spec = LatentPrologueSpec(layout, width, rotary, norm, dtype, rounded, *placed, invariant, d_rope)
        inputs = {"latent": latent, "norm_weight": norm_weight, "cos_sin": cos_sin, "positions": positions, "slots": slots}
        inputs |= {"cache": cache, "eps": rotated.check_eps(eps)}
        return spec, LatentPrologueSizes(tokens), {**inputs, **paged.check_scale(known, scale)}

    def inputs(self, spec: LatentPrologueSpec, case: Case[LatentPrologueSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        blocks = tokens // spec.page + 2  # the last block is named by no slot
        cos_sin, positions = rotated.draw_positions(draw, tokens, spec.d_rope)
        dtype = rotated.NORM_DTYPES[spec.norm_weight]
        return {
            "latent": rotated.draw_rows(draw, tokens, spec.width + spec.d_rope),
            "norm_weight": draw.normal(spec.normalised, dtype=dtype) if spec.normalised else None,
            "cos_sin": cos_sin,
            "positions": positions,
            "slots": paged.draw_slots(draw, tokens, blocks, spec.page, spec.slots, case.distribution == "repeated"),
            "cache": spec.cache.empty(blocks, draw.device),
            "eps": 1e-6,
            **({"scale": 0.75} if paged.scales_of(spec.cache) == "tensor" else {}),
        }

    def reference(self, spec: LatentPrologueSpec, inputs: Inputs) -> Outputs:
        cache, slots = inputs["cache"].clone(), inputs["slots"]
        exact, layout = _exact(spec, inputs), spec.cache
        if isinstance(layout, KvPlainLayout):
            layout.store(cache, slots, exact.bfloat16())
            return {"cache": cache}
        nope, rope = exact.split((spec.width, spec.d_rope), -1)
        values, scales = quantize_groups(nope, layout.group, spec.power_of_two, inputs.get("scale"))
        layout.pack(cache, slots, values, scales, rope.bfloat16())
        return {"cache": cache}

    def allocate(self, spec: LatentPrologueSpec, inputs: Inputs) -> Outputs:
        return {"cache": inputs["cache"]}

    def check(self, spec: LatentPrologueSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        cache, slots = outputs["cache"], inputs["slots"]
        stored = last_of_each(slots, valid_slots(slots, len(cache) * spec.page))
        exact, slots, layout = _exact(spec, inputs)[stored], slots[stored], spec.cache
        expected = paged.untouched(cache)
        if isinstance(layout, KvPlainLayout):
            rows = cache[slots.long() // spec.page, slots.long() % spec.page, 0]
            layout.store(expected, slots, rows)
            found = [_close(rows, exact)]
        else:
            nope, scales, rope = layout.unpack(cache, slots)
            layout.pack(expected, slots, nope, scales, rope)
            shared = inputs.get("scale")
            scales = scales if shared is None else scales * shared
            rounded = layout.group, spec.power_of_two, shared
            found = [
                rotated.compare_quantised("nope", nope, scales, exact[:, : spec.width], *rounded),
                _close(rope, exact[:, spec.width :]),
            ]
        return compare.worst(*found, compare.equal("cache", as_bytes(cache), as_bytes(expected)))

    def cost(self, spec: LatentPrologueSpec, case: Case[LatentPrologueSizes]) -> Cost:
        width = spec.width + spec.d_rope
        per_token = 2 * width + spec.cache.bytes_per_token + 4 * spec.d_rope + 8 + paged.SLOTS[spec.slots].itemsize
        return Cost(8.0 * case.sizes.tokens * width, case.sizes.tokens * per_token, "fp32")

    def cases(self, spec: LatentPrologueSpec) -> Sequence[Case[LatentPrologueSizes]]:
        return [*(Case(LatentPrologueSizes(tokens)) for tokens in (5, 1, 0)), Case(LatentPrologueSizes(21), "repeated")]

    def long_cases(self, spec: LatentPrologueSpec) -> Sequence[Case[LatentPrologueSizes]]:
        return [Case(LatentPrologueSizes(tokens), "repeated") for tokens in (1000, 5000)]

    def options(self, spec: LatentPrologueSpec) -> Sequence[LatentPrologueSpec]:
        other = "latent" if spec.norm == "nope" and spec.d_rope else "nope"
        turned = replace(
            spec, rotary="half_split", norm=other, norm_weight="bf16", power_of_two=spec.roundings[-1], slots="i32"
        )
        plain = replace(spec, layout=PLAIN, norm="none", power_of_two=False)
        return tuple(dict.fromkeys((spec, turned, plain)))

    def workloads(self, spec: LatentPrologueSpec) -> Sequence[Case[LatentPrologueSizes]]:
        return [Case(LatentPrologueSizes(tokens)) for tokens in (4096, 64)]


def _check_norm(weight: Any, width: int, d_rope: int, like: Tensor) -> tuple[str, str]:
    """(what the norm takes together, the dtype of its weight)."""
    if weight is None:
        return "none", "fp32"
    weight = checks.tensor("norm_weight", weight, (None,), tuple(rotated.NORM_DTYPES.values()), like=like)
    reaches = {width + d_rope: "latent", width: "nope"}
    if len(weight) not in reaches:
        raise InputError("norm_weight", f"{len(weight)} channels", " or ".join(map(str, reaches)))
    return reaches[len(weight)], rotated.NORM_NAMES[weight.dtype]


def _exact(spec: LatentPrologueSpec, inputs: Inputs) -> Tensor:
    """fp32 [tokens, d_nope + d_rope] before anything is rounded."""
    x = inputs["latent"].float()
    if spec.normalised:
        kept, rest = x.split((spec.normalised, x.shape[1] - spec.normalised), -1)
        kept = torch.nn.functional.rms_norm(kept, kept.shape[-1:], inputs["norm_weight"].float(), inputs["eps"])
        x = torch.cat((kept, rest), -1)
    if not spec.d_rope:
        return x
    nope, rope = x.split((spec.width, spec.d_rope), -1)
    return torch.cat((nope, rotated.rotate(rope, inputs["cos_sin"], inputs["positions"], spec.rotary)), -1)


def _close(rows: Tensor, exact: Tensor) -> Accuracy:
    """bf16 rows against exact ones; what is not a number is so in both."""
    broken = ~exact.isfinite()
    if not torch.equal(~rows.isfinite(), broken):
        return Accuracy(False, float("inf"), float("inf"), "rows: other channels are not finite than the reference's")
    return compare.close("rows", rows.masked_fill(broken, 0), exact.masked_fill(broken, 0), _BF16)
