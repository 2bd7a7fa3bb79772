"""BF16 -> the paged caches: quantise new tokens, or take them as they are, and scatter them to their slots.

The layouts are those of ``caches`` and ``kv_layouts``: "index_k" (a scale per token), "v32" (fp32 scales per 128 channels, rope
in bf16), "v4" (power-of-two scales per 64 channels, rope in bf16), rows of any channels ("fp8_fp32_64", …) and "bf16". A group
with largest magnitude ``a`` gets the scale ``max(a, 1e-4) / 448``, or the next power of two. An invalid slot (below 0, or past
the cache) is skipped; of rows with the same slot the last is stored, whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...problem import checks, compare, paged
from ...problem.draw import Draw
from ...problem.kv_layouts import KvPlainLayout
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ..paged_rows import PagedRowsSpec
from ..rows import RowSizes, as_bytes, check_rows, draw_rows


@dataclass(frozen=True)
class QuantizePagedSpec(PagedRowsSpec):
    """What changes the code."""

    power_of_two: bool = False
    """Whether scales are rounded up to powers of two; always so where they are stored as such."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("power_of_two", self.roundings)

    @property
    def roundings(self) -> tuple[bool, ...]:
        """What ``power_of_two`` may be."""
        return paged.roundings(self.cache)


@dataclass(frozen=True)
class QuantizePagedSizes(RowSizes):
    """What varies from call to call."""

    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (513,)}


class QuantizePagedProblem(Problem[QuantizePagedSpec, QuantizePagedSizes]):
    """See the module's first lines."""

    name = "quantize_paged"
    summary = "BF16 tokens to FP8, scattered to the slots of a paged cache."
    function = "quantize_paged"
    schema = (
        "(Tensor source, Tensor? rope, Tensor slots, Tensor(a!) cache, str layout='index_k', bool power_of_two=False, "
        "float scale=1.0) -> ()"
    )
    spec_type = QuantizePagedSpec
    sizes_type = QuantizePagedSizes
    minor = frozenset({"power_of_two", "slots", "page"})

    def specs_of(self, model: Model) -> Sequence[QuantizePagedSpec]:
        keys = QuantizePagedSpec("index_k", model.index_head_dim, model.page)
        if model.kv_layout == NO_CACHE:
            return (keys,)
        rounded = paged.scales_of(model.cache) == "e8m0"
        rows = QuantizePagedSpec(model.kv_layout, model.d_nope, model.page, d_rope=model.d_rope, power_of_two=rounded)
        return (rows, keys)

    def bind(self, *args: Any) -> tuple[QuantizePagedSpec, QuantizePagedSizes, Inputs]:
        source, rope, slots, cache, layout, power_of_two, scale = args
        checks.one_of("layout", layout, paged.LAYOUTS)
        source = check_rows("source", source)
        tokens, width = source.shape
        if width not in paged.WIDTHS[layout]:
            raise InputError("source", f"{width} channels", f"{paged.widths(layout)} in a cache of layout {layout!r}")
        inputs, d_rope = {"source": source}, 0
        if layout == "index_k" and rope is not None:
            raise InputError("rope", "a tensor", f"None for layout {layout!r}")
        if layout in paged.FIXED and rope is None:
            raise InputError("rope", "None", f"a tensor for layout {layout!r}")
        if rope is not None:
            inputs["rope"] = rope = check_rows("rope", rope, source)
            d_rope = rope.shape[1]
            if len(rope) != tokens or d_rope not in paged.ROPES[layout][-8:]:
                allowed = f"[{tokens}, {' or '.join(map(str, paged.ROPES[layout][-8:]))}]"
                raise InputError("rope", f"shape {list(rope.shape)}", f"shape {allowed}")
        slots = paged.check_slots(slots, tokens, source)
        known = paged.layout_of(layout, 1, width, d_rope)
        if layout == "bf16":
            page = paged.check_plain_rows("cache", cache, width + d_rope, torch.bfloat16, source)
        else:
            page = paged.check_cache("cache", cache, known.bytes_per_token, like=source)
        rounded = power_of_two or paged.scales_of(known) == "e8m0"
        given = {} if layout == "index_k" else {"d_rope": d_rope}
        spec = QuantizePagedSpec(layout, width, page, paged.SLOT_NAMES[slots.dtype], rounded, **given)
        inputs |= {"slots": slots, "cache": cache}
        return spec, QuantizePagedSizes(tokens), {**inputs, **paged.check_scale(known, scale)}

    def inputs(self, spec: QuantizePagedSpec, case: Case[QuantizePagedSizes], draw: Draw) -> Inputs:
        tokens, d_rope = case.sizes.tokens, paged.rope_of(spec.cache)
        rows = draw_rows(draw, tokens, spec.width + d_rope)
        # The last block is named by no slot: `check` finds there what the cache held before.
        blocks = tokens // spec.page + 2
        return {
            "source": rows[:, : spec.width],
            **({"rope": rows[:, spec.width :]} if d_rope else {}),
            "slots": paged.draw_slots(draw, tokens, blocks, spec.page, spec.slots, case.distribution == "repeated"),
            "cache": spec.cache.empty(blocks, draw.device),
            **({"scale": 0.75} if paged.scales_of(spec.cache) == "tensor" else {}),
        }

    def reference(self, spec: QuantizePagedSpec, inputs: Inputs) -> Outputs:
        layout, cache = spec.cache, inputs["cache"].clone()
        if isinstance(layout, KvPlainLayout):
            rows = [inputs[name] for name in ("source", "rope") if name in inputs]
            layout.store(cache, inputs["slots"], torch.cat(rows, 1))
            return {"cache": cache}
        shared = inputs.get("scale")
        values, scales = quantize_groups(inputs["source"], paged.group_of(layout), spec.power_of_two, shared)
        paged.pack(layout, cache, inputs["slots"], values, scales, inputs.get("rope"))
        return {"cache": cache}

    def allocate(self, spec: QuantizePagedSpec, inputs: Inputs) -> Outputs:
        return {"cache": inputs["cache"]}

    def check(self, spec: QuantizePagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        # The kernel wrote into the very cache that the reference copied, so that a stray write would be in both. A cache
        # that held one byte everywhere must now hold the reference's fields around that byte.
        before = paged.untouched(outputs["cache"])
        expected = self.reference(spec, {**inputs, "cache": before})
        return compare.equal("cache", as_bytes(outputs["cache"]), as_bytes(expected["cache"]))

    def cost(self, spec: QuantizePagedSpec, case: Case[QuantizePagedSizes]) -> Cost:
        tokens, layout = case.sizes.tokens, spec.cache
        moved = 2 * (spec.width + paged.rope_of(layout)) + layout.bytes_per_token + paged.SLOTS[spec.slots].itemsize
        return Cost(3.0 * tokens * spec.width, tokens * moved, "fp32")

    def cases(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        repeated = Case(QuantizePagedSizes(70), "repeated")
        return [*(Case(QuantizePagedSizes(tokens)) for tokens in (37, 1, 130, 0)), repeated]

    def long_cases(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        return [Case(QuantizePagedSizes(tokens), "repeated") for tokens in (1000, 5000)]

    def options(self, spec: QuantizePagedSpec) -> Sequence[QuantizePagedSpec]:
        keys = QuantizePagedSpec("index_k", 128, spec.page)
        further = (
            replace(spec, power_of_two=spec.roundings[-1], slots="i64"),
            keys,
            replace(keys, width=64, power_of_two=True, slots="i64"),
        )
        return (spec, *further)

    def workloads(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        return [Case(QuantizePagedSizes(tokens)) for tokens in (4096, 64)]
