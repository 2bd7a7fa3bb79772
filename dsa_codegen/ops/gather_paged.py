"""The paged FP8 caches -> flat tensors: index keys as they are stored, KV dequantised to BF16 latents.

The prefill indexer wants flat e4m3 keys and their scales, prefill attention flat bf16 latents; chunked prefill reads both
from the caches that earlier chunks wrote. An invalid slot (below 0, or past the cache) gives zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..caches import IndexKLayout, Layout, quantize_groups, tokens_of, valid_slots
from ..draw import Draw
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation
from ..paged import (
    LAYOUTS,
    SLOT_NAMES,
    SLOTS,
    WIDTHS,
    check_cache,
    check_slots,
    draw_slots,
    group_of,
    layout_of,
    pack,
    rope_of,
    template_names,
)
from ..presets import Model
from ..values import Scalar, Sizes, Spec
from .quantize import ROW_PARAMETERS, draw_rows, same_bytes, values_per_thread
from .quantize_paged import guess


@dataclass(frozen=True)
class GatherPagedSpec(Spec):
    """What changes the code."""

    layout: str
    width: int
    """Channels that are quantised: head_dim of the index keys, d_nope of a KV cache."""
    page: int = 64
    slots: str = "i32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("layout", LAYOUTS)
        self.require_in("width", WIDTHS[self.layout])
        self.require_range("page", 1, 1024)
        self.require_in("slots", SLOTS)

    @property
    def cache(self) -> Layout:
        """How a block of the cache is laid out."""
        return layout_of(self.layout, self.page, self.width)


@dataclass(frozen=True)
class GatherPagedSizes(Sizes):
    """What varies from call to call."""

    tokens: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (4097,)}


class GatherPaged(Op[GatherPagedSpec, GatherPagedSizes]):
    """See the module's first lines."""

    name = "gather_paged"
    summary = "Slots of a paged FP8 cache to flat tensors: index keys as stored, KV as bf16 latents."
    function = "gather_paged"
    schema = "(Tensor cache, Tensor slots, str layout='index_k') -> Tensor[]"
    spec_type = GatherPagedSpec
    sizes_type = GatherPagedSizes
    backends = ("triton",)
    minor = frozenset({"slots", "page"})
    min_capability = 89

    def specs(self, model: Model) -> Sequence[GatherPagedSpec]:
        keys = GatherPagedSpec("index_k", model.index_head_dim, model.page)
        return (keys, GatherPagedSpec(model.kv_layout, WIDTHS[model.kv_layout][0], model.page))

    def bind(self, *args: Any) -> tuple[GatherPagedSpec, GatherPagedSizes, Inputs]:
        cache, slots, layout = args
        checks.one_of("layout", layout, LAYOUTS)
        # A cache of index keys states their width in its last dimension.
        width = (cache.shape[-1] if cache.dim() else 0) - 4 if layout == "index_k" else WIDTHS[layout][0]
        if width not in WIDTHS[layout]:
            allowed = ", ".join(str(width + 4) for width in WIDTHS[layout])
            raise InputError("cache", f"shape {list(cache.shape)}", f"[blocks, page, 1, {allowed}]")
        page = check_cache("cache", cache, layout_of(layout, 1, width).bytes_per_token)
        check_slots(slots, None, cache)
        spec = GatherPagedSpec(layout, width, page, SLOT_NAMES[slots.dtype])
        return spec, GatherPagedSizes(slots.shape[0]), {"cache": cache, "slots": slots}

    def inputs(self, spec: GatherPagedSpec, case: Case[GatherPagedSizes], draw: Draw) -> Inputs:
        tokens = case.sizes.tokens
        blocks = tokens // spec.page + 2
        slots = draw_slots(draw, tokens, blocks, spec.page, spec.slots)
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
        d_rope = rope_of(spec.cache)
        if d_rope:
            return {"latent": torch.empty(tokens, spec.width + d_rope, dtype=torch.bfloat16, device=device)}
        values = torch.empty(tokens, spec.width, dtype=checks.FP8, device=device)
        return {"values": values, "scales": torch.empty(tokens, dtype=torch.float32, device=device)}

    def check(self, spec: GatherPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return same_bytes(outputs, reference)

    def cost(self, spec: GatherPagedSpec, case: Case[GatherPagedSizes]) -> Cost:
        tokens, stored, d_rope = case.sizes.tokens, spec.cache.bytes_per_token, rope_of(spec.cache)
        flat = 2 * (spec.width + d_rope) if d_rope else stored
        return Cost(float(tokens * spec.width), tokens * (stored + flat + SLOTS[spec.slots].itemsize), "fp32")

    def cases(self, spec: GatherPagedSpec) -> Sequence[Case[GatherPagedSizes]]:
        return [Case(GatherPagedSizes(tokens)) for tokens in (37, 1, 130, 0)]

    def options(self, spec: GatherPagedSpec) -> Sequence[GatherPagedSpec]:
        v32, v4 = (GatherPagedSpec(name, WIDTHS[name][0], spec.page) for name in ("v32", "v4"))
        return (spec, v32, v4, *(replace(option, slots="i64") for option in (spec, v32, v4)))

    def workloads(self, spec: GatherPagedSpec) -> Sequence[Case[GatherPagedSizes]]:
        return [Case(GatherPagedSizes(tokens)) for tokens in (32768, 1024)]

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return ROW_PARAMETERS

    def constraints(self, spec: GatherPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        names = self.derived(spec, config)
        yield from values_per_thread(config, int(names["groups_padded"]) * int(names["group"]))

    def guesses(self, spec: GatherPagedSpec, sizes: GatherPagedSizes, gpu: Gpu) -> Iterable[Config]:
        yield guess(spec.width, sizes.tokens, gpu)

    def derived(self, spec: GatherPagedSpec, config: Config) -> dict[str, Scalar]:
        return template_names(spec.cache, spec.width)

    def launches(self, spec: GatherPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        cache, slots = inputs["cache"], inputs["slots"]
        rows = slots.shape[0]
        if not rows:
            return ()
        args = (cache, slots, *outputs.values(), rows, cache.shape[0] * spec.page, cache.stride(0))
        return (Launch("gather_paged", (-(-rows // config["block_t"]), 1, 1), args),)


def _filled(spec: GatherPagedSpec, blocks: int, draw: Draw) -> Tensor:
    """A cache with quantised random rows in every slot."""
    layout = spec.cache
    cache = layout.empty(blocks, draw.device)
    if draw.device == "meta":
        return cache
    slots = torch.arange(blocks * spec.page, device=draw.device)
    values, scales = quantize_groups(draw_rows(draw, len(slots), spec.width), group_of(layout), spec.layout == "v4")
    rope = draw_rows(draw, len(slots), rope_of(layout)) if rope_of(layout) else None
    pack(layout, cache, slots, values, scales, rope)
    return cache


OP = GatherPaged()
