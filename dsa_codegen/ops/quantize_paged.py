"""BF16 -> the paged FP8 caches: quantise new tokens and scatter them to their slots.

The layouts are those of ``caches``: "index_k" (a scale per token), "v32" (fp32 scales per 128 channels, rope in bf16) and
"v4" (power-of-two scales per 64 channels, rope in bf16). A group with largest magnitude ``a`` gets the scale
``max(a, 1e-4) / 448``, or the next power of two. An invalid slot (below 0, or past the cache) is skipped; two rows with the
same slot leave either of them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .. import checks, compare
from ..caches import Layout, quantize_groups
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
from .quantize import ROW_PARAMETERS, as_bytes, check_rows, draw_rows, limits, values_per_thread


@dataclass(frozen=True)
class QuantizePagedSpec(Spec):
    """What changes the code."""

    layout: str
    width: int
    """Channels that are quantised: head_dim of the index keys, d_nope of a KV cache."""
    page: int = 64
    power_of_two: bool = False
    """Whether scales are rounded up to powers of two; always so in "v4"."""
    slots: str = "i32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("layout", LAYOUTS)
        self.require_in("width", WIDTHS[self.layout])
        self.require_range("page", 1, 1024)
        self.require_in("power_of_two", (True,) if self.layout == "v4" else (False, True))
        self.require_in("slots", SLOTS)

    @property
    def cache(self) -> Layout:
        """How a block of the cache is laid out."""
        return layout_of(self.layout, self.page, self.width)


@dataclass(frozen=True)
class QuantizePagedSizes(Sizes):
    """What varies from call to call."""

    tokens: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (513,)}


class QuantizePaged(Op[QuantizePagedSpec, QuantizePagedSizes]):
    """See the module's first lines."""

    name = "quantize_paged"
    summary = "BF16 tokens to FP8, scattered to the slots of a paged cache."
    function = "quantize_paged"
    schema = (
        "(Tensor source, Tensor? rope, Tensor slots, Tensor(a!) cache, str layout='index_k', bool power_of_two=False) -> ()"
    )
    spec_type = QuantizePagedSpec
    sizes_type = QuantizePagedSizes
    backends = ("triton",)
    minor = frozenset({"power_of_two", "slots", "page"})
    min_capability = 89

    def specs(self, model: Model) -> Sequence[QuantizePagedSpec]:
        keys = QuantizePagedSpec("index_k", model.index_head_dim, model.page)
        if model.d_nope not in WIDTHS[model.kv_layout] or model.d_rope != rope_of(layout_of(model.kv_layout, 1, model.d_nope)):
            return (keys,)
        return (QuantizePagedSpec(model.kv_layout, model.d_nope, model.page, model.kv_layout == "v4"), keys)

    def bind(self, *args: Any) -> tuple[QuantizePagedSpec, QuantizePagedSizes, Inputs]:
        source, rope, slots, cache, layout, power_of_two = args
        checks.one_of("layout", layout, LAYOUTS)
        tokens, width = check_rows("source", source).shape
        if width not in WIDTHS[layout]:
            raise InputError("source", f"{width} channels", " or ".join(map(str, WIDTHS[layout])))
        known = layout_of(layout, 1, width)
        inputs = {"source": source}
        if (rope is not None) != bool(rope_of(known)):
            came, allowed = ("None", "a tensor") if rope is None else ("a tensor", "None")
            raise InputError("rope", came, f"{allowed} for layout {layout!r}")
        if rope is not None:
            inputs["rope"] = check_rows("rope", rope, source)
            if rope.shape != (tokens, rope_of(known)):
                raise InputError("rope", f"shape {list(rope.shape)}", f"shape {[tokens, rope_of(known)]}")
        check_slots(slots, tokens, source)
        page = check_cache("cache", cache, known.bytes_per_token, like=source)
        spec = QuantizePagedSpec(layout, width, page, power_of_two or layout == "v4", SLOT_NAMES[slots.dtype])
        return spec, QuantizePagedSizes(tokens), {**inputs, "slots": slots, "cache": cache}

    def inputs(self, spec: QuantizePagedSpec, case: Case[QuantizePagedSizes], draw: Draw) -> Inputs:
        tokens, d_rope = case.sizes.tokens, rope_of(spec.cache)
        rows = draw_rows(draw, tokens, spec.width + d_rope)
        # The last block is named by no slot: `check` finds there what the cache held before.
        blocks = tokens // spec.page + 2
        return {
            "source": rows[:, : spec.width],
            **({"rope": rows[:, spec.width :]} if d_rope else {}),
            "slots": draw_slots(draw, tokens, blocks, spec.page, spec.slots),
            "cache": spec.cache.empty(blocks, draw.device),
        }

    def reference(self, spec: QuantizePagedSpec, inputs: Inputs) -> Outputs:
        layout, cache = spec.cache, inputs["cache"].clone()
        values, scales = quantize_groups(inputs["source"], group_of(layout), spec.power_of_two)
        pack(layout, cache, inputs["slots"], values, scales, inputs.get("rope"))
        return {"cache": cache}

    def allocate(self, spec: QuantizePagedSpec, inputs: Inputs) -> Outputs:
        return {"cache": inputs["cache"]}

    def check(self, spec: QuantizePagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        # The kernel wrote into the very cache that the reference copied, so that a stray write would be in both. A cache
        # that held one byte everywhere must now hold the reference's fields around that byte.
        before = torch.full_like(outputs["cache"], int(outputs["cache"][-1].flatten()[-1]))
        expected = self.reference(spec, {**inputs, "cache": before})
        return compare.equal("cache", as_bytes(outputs["cache"]), as_bytes(expected["cache"]))

    def cost(self, spec: QuantizePagedSpec, case: Case[QuantizePagedSizes]) -> Cost:
        tokens, layout = case.sizes.tokens, spec.cache
        moved = 2 * (spec.width + rope_of(layout)) + layout.bytes_per_token + SLOTS[spec.slots].itemsize
        return Cost(3.0 * tokens * spec.width, tokens * moved, "fp32")

    def cases(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        return [Case(QuantizePagedSizes(tokens)) for tokens in (37, 1, 130, 0)]

    def options(self, spec: QuantizePagedSpec) -> Sequence[QuantizePagedSpec]:
        keys = QuantizePagedSpec("index_k", 128, spec.page)
        further = (replace(spec, power_of_two=True, slots="i64"), keys, replace(keys, width=64, power_of_two=True, slots="i64"))
        return (spec, *further)

    def workloads(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        return [Case(QuantizePagedSizes(tokens)) for tokens in (4096, 64)]

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return ROW_PARAMETERS

    def constraints(self, spec: QuantizePagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        names = self.derived(spec, config)
        yield from values_per_thread(config, int(names["groups_padded"]) * int(names["group"]))

    def guesses(self, spec: QuantizePagedSpec, sizes: QuantizePagedSizes, gpu: Gpu) -> Iterable[Config]:
        yield guess(spec.width, sizes.tokens, gpu)

    def derived(self, spec: QuantizePagedSpec, config: Config) -> dict[str, Scalar]:
        return {**template_names(spec.cache, spec.width), **limits()}

    def launches(self, spec: QuantizePagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        cache, source, rope = inputs["cache"], inputs["source"], inputs.get("rope")
        rows = source.shape[0]
        if not rows:
            return ()
        strides = (source.stride(0),) if rope is None else (source.stride(0), rope.stride(0))
        args = (*inputs.values(), rows, cache.shape[0] * spec.page, cache.stride(0), *strides)
        return (Launch("quantize_paged", (-(-rows // config["block_t"]), 1, 1), args),)


def guess(width: int, tokens: int, gpu: Gpu) -> Config:
    """16 values per thread; few tokens are spread over more, smaller blocks."""
    if tokens < 8 * gpu.sms:
        return Config.of("triton", block_t=1, num_warps=2 if width > 128 else 1)
    return Config.of("triton", block_t=4 if width > 128 else 16, num_warps=4)


OP = QuantizePaged()
