"""The paged FP8 caches -> flat tensors: index keys as they are stored, KV dequantised to BF16 latents.

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
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import MLA, NO_CACHE, Model
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
    schema = "(Tensor cache, Tensor slots, str layout='index_k') -> Tensor[]"
    spec_type = GatherPagedSpec
    sizes_type = GatherPagedSizes
    minor = frozenset({"slots", "page"})

    def specs(self, model: Model) -> Sequence[GatherPagedSpec]:
        if model.attention != MLA:
            return ()
        keys = GatherPagedSpec("index_k", model.index_head_dim, model.page)
        if model.kv_layout == NO_CACHE:
            return (keys,)
        return (keys, GatherPagedSpec(model.kv_layout, paged.WIDTHS[model.kv_layout][0], model.page))

    def bind(self, *args: Any) -> tuple[GatherPagedSpec, GatherPagedSizes, Inputs]:
        cache, slots, layout = args
        checks.one_of("layout", layout, paged.LAYOUTS)
        # A cache of index keys states their width in its last dimension.
        checks.check_kind("cache", cache, "Tensor")
        width = (cache.shape[-1] if cache.dim() else 0) - 4 if layout == "index_k" else paged.WIDTHS[layout][0]
        if width not in paged.WIDTHS[layout]:
            allowed = ", ".join(str(width + 4) for width in paged.WIDTHS[layout])
            raise InputError("cache", f"shape {list(cache.shape)}", f"[blocks, page, 1, {allowed}]")
        page = paged.check_cache("cache", cache, paged.layout_of(layout, 1, width).bytes_per_token)
        slots = paged.check_slots(slots, None, cache)
        spec = GatherPagedSpec(layout, width, page, paged.SLOT_NAMES[slots.dtype])
        return spec, GatherPagedSizes(slots.shape[0]), {"cache": cache, "slots": slots}

    def inputs(self, spec: GatherPagedSpec, case: Case[GatherPagedSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        blocks = tokens // spec.page + 2
        slots = paged.draw_slots(draw, tokens, blocks, spec.page, spec.slots)
        return {"cache": _filled(spec, blocks, draw), "slots": slots}

    def reference(self, spec: GatherPagedSpec, inputs: Inputs) -> Outputs:
        cache, slots, layout = inputs["cache"], inputs["slots"], spec.cache
        invalid = ~valid_slots(slots, tokens_of(layout, cache))
        if not len(cache):  # then every slot is invalid, but the gather below needs something to read
            cache = layout.empty(1, slots.device)
        slots = slots.masked_fill(invalid, 0)
        if not isinstance(layout, IndexKLayout):
            return {"latent": layout.dequantize(cache, slots).masked_fill(invalid[:, None], 0).bfloat16()}
        values, scales = layout.unpack(cache, slots)
        values = values.view(torch.uint8).masked_fill(invalid[:, None], 0).view(checks.FP8)
        return {"values": values, "scales": scales.masked_fill(invalid, 0)}

    def allocate(self, spec: GatherPagedSpec, inputs: Inputs) -> Outputs:
        tokens, device = inputs["slots"].shape[0], inputs["slots"].device
        d_rope = paged.rope_of(spec.cache)
        if d_rope:
            return {"latent": torch.empty(tokens, spec.width + d_rope, dtype=torch.bfloat16, device=device)}
        values = torch.empty(tokens, spec.width, dtype=checks.FP8, device=device)
        return {"values": values, "scales": torch.empty(tokens, dtype=torch.float32, device=device)}

    def check(self, spec: GatherPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return same_bytes(outputs, reference)

    def cost(self, spec: GatherPagedSpec, case: Case[GatherPagedSizes]) -> Cost:
        tokens, stored, d_rope = case.sizes.tokens, spec.cache.bytes_per_token, paged.rope_of(spec.cache)
        flat = 2 * (spec.width + d_rope) if d_rope else stored
        return Cost(float(tokens * spec.width), tokens * (stored + flat + paged.SLOTS[spec.slots].itemsize), "fp32")

    def cases(self, spec: GatherPagedSpec) -> Sequence[Case[GatherPagedSizes]]:
        return [Case(GatherPagedSizes(tokens)) for tokens in (37, 1, 130, 0)]

    def options(self, spec: GatherPagedSpec) -> Sequence[GatherPagedSpec]:
        v32, v4 = (GatherPagedSpec(name, paged.WIDTHS[name][0], spec.page) for name in ("v32", "v4"))
        return (spec, v32, v4, *(replace(option, slots="i64") for option in (spec, v32, v4)))

    def workloads(self, spec: GatherPagedSpec) -> Sequence[Case[GatherPagedSizes]]:
        return [Case(GatherPagedSizes(tokens)) for tokens in (32768, 1024)]


def _filled(spec: GatherPagedSpec, blocks: int, draw: Draw) -> Tensor:
    """A cache with quantised random rows in every slot."""
    layout = spec.cache
    cache = layout.empty(blocks, draw.device)
    if draw.device == "meta":
        return cache
    slots = torch.arange(blocks * spec.page, device=draw.device)
    values, scales = quantize_groups(draw_rows(draw, len(slots), spec.width), paged.group_of(layout), spec.layout == "v4")
    rope = draw_rows(draw, len(slots), paged.rope_of(layout)) if paged.rope_of(layout) else None
    paged.pack(layout, cache, slots, values, scales, rope)
    return cache
