"""The paged caches -> flat tensors: index keys as they are stored, KV dequantised to BF16 latents.

The prefill indexer wants flat e4m3 keys and their scales, prefill attention flat bf16 latents; chunked prefill reads both
from the caches that earlier chunks wrote. An invalid slot (below 0, or past the cache) gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, paged
from ...problem.caches import IndexKLayout, tokens_of, valid_slots
from ...problem.draw import Draw
from ...problem.kv_layouts import KvPlainLayout
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ..paged_rows import PagedRowsSpec
from ..rows import RowSizes, draw_rows, same_bytes


@dataclass(frozen=True)
class GatherPagedSpec(PagedRowsSpec):
    """What changes the code."""


@dataclass(frozen=True)
class GatherPagedSizes(RowSizes):
    """What varies from call to call."""

    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (4097,)}


class GatherPagedProblem(Problem[GatherPagedSpec, GatherPagedSizes]):
    """See the module's first lines."""

    name = "gather_paged"
    summary = "Slots of a paged FP8 cache to flat tensors: index keys as stored, KV as bf16 latents."
    function = "gather_paged"
    schema = "(Tensor cache, Tensor slots, str layout='index_k', int d_rope=64, float scale=1.0) -> Tensor[]"
    spec_type = GatherPagedSpec
    sizes_type = GatherPagedSizes
    minor = frozenset({"slots", "page"})

    def specs_of(self, model: Model) -> Sequence[GatherPagedSpec]:
        keys = GatherPagedSpec("index_k", model.index_head_dim, model.page)
        if model.kv_layout == NO_CACHE:
            return (keys,)
        plain = model.kv_layout == "bf16"
        width, d_rope = (model.d_qk, 0) if plain else (model.d_nope, model.d_rope)
        return (keys, GatherPagedSpec(model.kv_layout, width, model.page, d_rope=d_rope))

    def bind(self, *args: Any) -> tuple[GatherPagedSpec, GatherPagedSizes, Inputs]:
        cache, slots, layout, d_rope, scale = args
        checks.one_of("layout", layout, paged.LAYOUTS)
        checks.check_kind("cache", cache, "Tensor")
        if layout not in ("index_k", *paged.FIXED):
            checks.one_of("d_rope", d_rope, paged.ROPES[layout])
        plain = layout == "bf16"
        d_rope = 0 if plain else paged.D_ROPE if layout in ("index_k", *paged.FIXED) else d_rope
        width = _width(cache, layout, d_rope)
        known = paged.layout_of(layout, 1, width, d_rope)
        if plain:
            page = paged.check_plain_rows("cache", cache, width, torch.bfloat16)
        else:
            page = paged.check_cache("cache", cache, known.bytes_per_token)
        slots = paged.check_slots(slots, None, cache)
        spec = GatherPagedSpec(layout, width, page, paged.SLOT_NAMES[slots.dtype], d_rope=d_rope)
        inputs = {"cache": cache, "slots": slots, **paged.check_scale(known, scale)}
        return spec, GatherPagedSizes(slots.shape[0]), inputs

    def inputs(self, spec: GatherPagedSpec, case: Case[GatherPagedSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        blocks = tokens // spec.page + 2
        slots = paged.draw_slots(draw, tokens, blocks, spec.page, spec.slots)
        shared = {"scale": 0.75} if paged.scales_of(spec.cache) == "tensor" else {}
        return {"cache": _filled(spec, blocks, draw), "slots": slots, **shared}

    def reference(self, spec: GatherPagedSpec, inputs: Inputs) -> Outputs:
        cache, slots, layout = inputs["cache"], inputs["slots"], spec.cache
        invalid = ~valid_slots(slots, tokens_of(layout, cache))
        if not len(cache):  # then every slot is invalid, but the gather below needs something to read
            cache = layout.empty(1, slots.device)
        slots = slots.masked_fill(invalid, 0)
        if not isinstance(layout, IndexKLayout):
            latent = layout.dequantize(cache, slots, inputs.get("scale", 1.0))
            return {"latent": latent.masked_fill(invalid[:, None], 0).bfloat16()}
        values, scales = layout.unpack(cache, slots)
        values = values.view(torch.uint8).masked_fill(invalid[:, None], 0).view(checks.FP8)
        return {"values": values, "scales": scales.masked_fill(invalid, 0)}

    def allocate(self, spec: GatherPagedSpec, inputs: Inputs) -> Outputs:
        tokens, device = inputs["slots"].shape[0], inputs["slots"].device
        d_rope = paged.rope_of(spec.cache)
        if spec.layout != "index_k":
            return {"latent": torch.empty(tokens, spec.width + d_rope, dtype=torch.bfloat16, device=device)}
        values = torch.empty(tokens, spec.width, dtype=checks.FP8, device=device)
        return {"values": values, "scales": torch.empty(tokens, dtype=torch.float32, device=device)}

    def check(self, spec: GatherPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return same_bytes(outputs, reference)

    def cost(self, spec: GatherPagedSpec, case: Case[GatherPagedSizes]) -> Cost:
        tokens, stored, d_rope = case.sizes.tokens, spec.cache.bytes_per_token, paged.rope_of(spec.cache)
        flat = stored if spec.layout == "index_k" else 2 * (spec.width + d_rope)
        return Cost(float(tokens * spec.width), tokens * (stored + flat + paged.SLOTS[spec.slots].itemsize), "fp32")

    def cases(self, spec: GatherPagedSpec) -> Sequence[Case[GatherPagedSizes]]:
        return [Case(GatherPagedSizes(tokens)) for tokens in (37, 1, 130, 0)]

    def options(self, spec: GatherPagedSpec) -> Sequence[GatherPagedSpec]:
        v32, v4 = (GatherPagedSpec(name, paged.WIDTHS[name][0], spec.page) for name in ("v32", "v4"))
        return (spec, v32, v4, *(replace(option, slots="i64") for option in (spec, v32, v4)))

    def workloads(self, spec: GatherPagedSpec) -> Sequence[Case[GatherPagedSizes]]:
        return [Case(GatherPagedSizes(tokens)) for tokens in (32768, 1024)]


def _width(cache: Tensor, layout: str, d_rope: int) -> int:
    """Channels that a cache's last dimension says of a token; those that are quantised where it is FP8."""
    known, last = paged.WIDTHS[layout], cache.shape[-1] if cache.dim() else 0
    if layout in paged.FIXED:
        return known[0]
    sizes = {width: width if layout == "bf16" else paged.layout_of(layout, 1, width, d_rope).bytes_per_token for width in known}
    for width, size in sizes.items():
        if size == last:
            return width
    allowed = ", ".join(map(str, sizes.values()))
    raise InputError("cache", f"shape {list(cache.shape)}", f"[blocks, page, 1, {allowed}]")


def _filled(spec: GatherPagedSpec, blocks: int, draw: Draw) -> Tensor:
    """A cache with quantised random rows in every slot."""
    layout = spec.cache
    cache = layout.empty(blocks, draw.device)
    if draw.device == "meta":
        return cache
    slots = torch.arange(blocks * spec.page, device=draw.device)
    if isinstance(layout, KvPlainLayout):
        layout.store(cache, slots, draw_rows(draw, len(slots), layout.width))
        return cache
    drawn = draw_rows(draw, len(slots), spec.width)
    values, scales = quantize_groups(drawn, paged.group_of(layout), paged.scales_of(layout) == "e8m0")
    rope = draw_rows(draw, len(slots), paged.rope_of(layout)) if paged.rope_of(layout) else None
    paged.pack(layout, cache, slots, values, scales, rope)
    return cache
