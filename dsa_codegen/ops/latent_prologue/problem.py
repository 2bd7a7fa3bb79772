"""From the projection of the latents to the KV cache: RMSNorm where there is one, rotary position, FP8 or BF16, the slots.

A row is ``d_nope`` channels and then ``d_rope`` rotary ones, as the down projection gives them. ``x / sqrt(mean(x²) + eps) ·
norm_weight`` is taken over the first ones ("nope": DeepSeek-V3.2) or over all ("latent": V4), as far as norm_weight reaches.
The caches are "v32" and "v4" of ``caches``, quantised as ``quantize_paged`` does it, or "bf16": rows as they are. Invalid slots
are skipped; of rows with one slot the last is stored, whole. Nothing is rounded in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, compare, paged
from ...problem.caches import KvV4Layout, KvV32Layout, last_of_each, valid_slots
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import KV_LAYOUTS, MLA, NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ...problem.values import Spec
from .. import rotated
from ..rows import RowSizes, as_bytes, check_rows

PLAIN = "bf16"
LAYOUTS = (*KV_LAYOUTS, PLAIN)
D_ROPE = 64
_BYTES = {layout.name: layout.bytes_per_token for layout in (KvV32Layout, KvV4Layout)}
_WIDTHS = {"v32": (512,), "v4": (448,), PLAIN: (512, 448)}
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("layout", LAYOUTS)
        self.require_in("width", _WIDTHS[self.layout])
        self.require_in("rotary", rotated.STYLES)
        self.require_in("norm", ("none", "nope", "latent"))
        self.require_in("norm_weight", rotated.NORM_DTYPES)
        self.require_in("power_of_two", {"v32": (False, True), "v4": (True,), PLAIN: (False,)}[self.layout])
        self.require_range("page", 1, 1024)
        self.require_in("slots", paged.SLOTS)

    @property
    def cache(self) -> KvV32Layout | KvV4Layout:
        """How a block of an FP8 cache is laid out."""
        return KvV4Layout(self.page) if self.layout == "v4" else KvV32Layout(self.page)

    @property
    def normalised(self) -> int:
        """Channels that the norm takes together."""
        return {"none": 0, "nope": self.width, "latent": self.width + D_ROPE}[self.norm]


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
        "(Tensor latent, Tensor? norm_weight, Tensor cos_sin, Tensor positions, Tensor slots, Tensor(a!) cache, "
        "float eps=1e-6, str layout='v32', str rotary='interleaved', bool power_of_two=False, "
        "bool batch_invariant=False) -> ()"
    )
    spec_type = LatentPrologueSpec
    sizes_type = LatentPrologueSizes
    minor = frozenset({"rotary", "norm", "norm_weight", "power_of_two", "page", "slots", "batch_invariant"})

    def specs(self, model: Model) -> Sequence[LatentPrologueSpec]:
        if model.attention != MLA:
            return ()
        options: dict[str, Any] = {"page": model.page, "batch_invariant": model.invariant}
        if model.kv_layout == NO_CACHE:
            return (LatentPrologueSpec(PLAIN, model.d_nope, norm="nope", **options),)
        v4 = model.kv_layout == "v4"
        norm = "latent" if v4 else "nope"
        return (LatentPrologueSpec(model.kv_layout, model.d_nope, norm=norm, power_of_two=v4, **options),)

    def bind(self, *args: Any) -> tuple[LatentPrologueSpec, LatentPrologueSizes, Inputs]:
        latent, norm_weight, cos_sin, positions, slots, cache, eps, layout, rotary, power_of_two, invariant = args
        checks.one_of("layout", layout, LAYOUTS)
        latent = check_rows("latent", latent)
        tokens, width = latent.shape[0], latent.shape[1] - D_ROPE
        if width not in _WIDTHS[layout]:
            allowed = " or ".join(str(each + D_ROPE) for each in _WIDTHS[layout])
            raise InputError("latent", f"{width + D_ROPE} channels", f"{allowed} in a cache of layout {layout!r}")
        norm, dtype = _check_norm(norm_weight, width, latent)
        cos_sin, positions = rotated.check_positions(cos_sin, positions, tokens, latent)
        if cos_sin.shape[1] != D_ROPE:
            raise InputError("cos_sin", f"{cos_sin.shape[1]} columns", f"{D_ROPE}")
        slots = paged.check_slots(slots, tokens, latent)
        page = _check_plain(cache, width, latent) if layout == PLAIN else _check_fp8(cache, layout, latent)
        checks.one_of("rotary", rotary, rotated.STYLES)
        rounded = power_of_two or layout == "v4"
        placed = page, paged.SLOT_NAMES[slots.dtype]
        spec = LatentPrologueSpec(layout, width, rotary, norm, dtype, rounded, *placed, invariant)
        inputs = {"latent": latent, "norm_weight": norm_weight, "cos_sin": cos_sin, "positions": positions, "slots": slots}
        return spec, LatentPrologueSizes(tokens), {**inputs, "cache": cache, "eps": rotated.check_eps(eps)}

    def inputs(self, spec: LatentPrologueSpec, case: Case[LatentPrologueSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        blocks = tokens // spec.page + 2  # the last block is named by no slot
        cos_sin, positions = rotated.draw_positions(draw, tokens, D_ROPE)
        dtype = rotated.NORM_DTYPES[spec.norm_weight]
        return {
            "latent": rotated.draw_rows(draw, tokens, spec.width + D_ROPE),
            "norm_weight": draw.normal(spec.normalised, dtype=dtype) if spec.normalised else None,
            "cos_sin": cos_sin,
            "positions": positions,
            "slots": paged.draw_slots(draw, tokens, blocks, spec.page, spec.slots, case.distribution == "repeated"),
            "cache": _empty(spec, blocks, draw.device),
            "eps": 1e-6,
        }

    def reference(self, spec: LatentPrologueSpec, inputs: Inputs) -> Outputs:
        cache, slots = inputs["cache"].clone(), inputs["slots"]
        exact = _exact(spec, inputs)
        if spec.layout == PLAIN:
            _store_plain(spec, cache, slots, exact.bfloat16())
            return {"cache": cache}
        nope, rope = exact.split((spec.width, D_ROPE), -1)
        values, scales = quantize_groups(nope, spec.cache.group, spec.power_of_two)
        spec.cache.pack(cache, slots, values, scales, rope.bfloat16())
        return {"cache": cache}

    def allocate(self, spec: LatentPrologueSpec, inputs: Inputs) -> Outputs:
        return {"cache": inputs["cache"]}

    def check(self, spec: LatentPrologueSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        cache, slots = outputs["cache"], inputs["slots"]
        stored = last_of_each(slots, valid_slots(slots, len(cache) * spec.page))
        exact, slots = _exact(spec, inputs)[stored], slots[stored]
        expected = _untouched(cache)
        if spec.layout == PLAIN:
            rows = cache[slots.long() // spec.page, slots.long() % spec.page, 0]
            _store_plain(spec, expected, slots, rows)
            found = [_close(rows, exact)]
        else:
            nope, scales, rope = spec.cache.unpack(cache, slots)
            spec.cache.pack(expected, slots, nope, scales, rope)
            rounded = spec.cache.group, spec.power_of_two
            found = [
                rotated.compare_quantised("nope", nope, scales, exact[:, : spec.width], *rounded),
                _close(rope, exact[:, spec.width :]),
            ]
        return compare.worst(*found, compare.equal("cache", as_bytes(cache), as_bytes(expected)))

    def cost(self, spec: LatentPrologueSpec, case: Case[LatentPrologueSizes]) -> Cost:
        width = spec.width + D_ROPE
        stored = 2 * width if spec.layout == PLAIN else spec.cache.bytes_per_token
        per_token = 2 * width + stored + 4 * D_ROPE + 8 + paged.SLOTS[spec.slots].itemsize
        return Cost(8.0 * case.sizes.tokens * width, case.sizes.tokens * per_token, "fp32")

    def cases(self, spec: LatentPrologueSpec) -> Sequence[Case[LatentPrologueSizes]]:
        return [*(Case(LatentPrologueSizes(tokens)) for tokens in (5, 1, 0)), Case(LatentPrologueSizes(21), "repeated")]

    def long_cases(self, spec: LatentPrologueSpec) -> Sequence[Case[LatentPrologueSizes]]:
        return [Case(LatentPrologueSizes(tokens), "repeated") for tokens in (1000, 5000)]

    def options(self, spec: LatentPrologueSpec) -> Sequence[LatentPrologueSpec]:
        other = "latent" if spec.norm == "nope" else "nope"
        turned = replace(
            spec, rotary="half_split", norm=other, norm_weight="bf16", power_of_two=spec.layout != PLAIN, slots="i32"
        )
        plain = replace(spec, layout=PLAIN, norm="none", power_of_two=False)
        return tuple(dict.fromkeys((spec, turned, plain)))

    def workloads(self, spec: LatentPrologueSpec) -> Sequence[Case[LatentPrologueSizes]]:
        return [Case(LatentPrologueSizes(tokens)) for tokens in (4096, 64)]


def _check_norm(weight: Any, width: int, like: Tensor) -> tuple[str, str]:
    """(what the norm takes together, the dtype of its weight)."""
    if weight is None:
        return "none", "fp32"
    weight = checks.tensor("norm_weight", weight, (None,), tuple(rotated.NORM_DTYPES.values()), like=like)
    reaches = {width: "nope", width + D_ROPE: "latent"}
    if len(weight) not in reaches:
        raise InputError("norm_weight", f"{len(weight)} channels", " or ".join(map(str, reaches)))
    return reaches[len(weight)], rotated.NORM_NAMES[weight.dtype]


def _check_fp8(cache: Any, layout: str, like: Tensor) -> int:
    """The page of an FP8 cache."""
    return paged.check_cache("cache", cache, _BYTES[layout], like=like)


def _check_plain(cache: Any, width: int, like: Tensor) -> int:
    """The page of a bf16 cache [blocks, page, 1, d]; blocks may lie apart."""
    d = width + D_ROPE
    cache = checks.tensor("cache", cache, (None, None, 1, d), torch.bfloat16, like=like, inner_contiguous=True)
    blocks, page = cache.shape[:2]
    if (page > 1 and cache.stride(1) != d) or (blocks > 1 and (cache.stride(0) % d or cache.stride(0) < page * d)):
        raise InputError("cache", f"strides {cache.stride()}", f"pages of rows {d} elements apart, whole rows between blocks")
    return int(page)


def _empty(spec: LatentPrologueSpec, blocks: int, device: str) -> Tensor:
    if spec.layout != PLAIN:
        return spec.cache.empty(blocks, device)
    return torch.zeros(blocks, spec.page, 1, spec.width + D_ROPE, dtype=torch.bfloat16, device=device)


def _untouched(cache: Tensor) -> Tensor:
    """The cache as it was: one byte, or number, everywhere; its last block is named by no slot."""
    bits = cache.contiguous().view(torch.int16 if cache.dtype == torch.bfloat16 else torch.uint8)
    return torch.full_like(bits, int(bits[-1].flatten()[-1])).view(cache.dtype)


def _store_plain(spec: LatentPrologueSpec, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write bf16 rows to their slots."""
    stored = last_of_each(slots, valid_slots(slots, len(cache) * spec.page))
    where = slots[stored].long()
    cache[where // spec.page, where % spec.page, 0] = rows[stored]


def _exact(spec: LatentPrologueSpec, inputs: Inputs) -> Tensor:
    """fp32 [tokens, d_nope + d_rope] before anything is rounded."""
    x = inputs["latent"].float()
    if spec.normalised:
        kept, rest = x.split((spec.normalised, x.shape[1] - spec.normalised), -1)
        kept = torch.nn.functional.rms_norm(kept, kept.shape[-1:], inputs["norm_weight"].float(), inputs["eps"])
        x = torch.cat((kept, rest), -1)
    nope, rope = x.split((spec.width, D_ROPE), -1)
    return torch.cat((nope, rotated.rotate(rope, inputs["cos_sin"], inputs["positions"], spec.rotary)), -1)


def _close(rows: Tensor, exact: Tensor) -> Accuracy:
    """bf16 rows against exact ones; what is not a number is so in both."""
    broken = ~exact.isfinite()
    if not torch.equal(~rows.isfinite(), broken):
        return Accuracy(False, float("inf"), float("inf"), "rows: other channels are not finite than the reference's")
    return compare.close("rows", rows.masked_fill(broken, 0), exact.masked_fill(broken, 0), _BF16)
