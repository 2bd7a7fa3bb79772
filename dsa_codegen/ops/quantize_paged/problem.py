"""BF16 -> the paged FP8 caches: quantise new tokens and scatter them to their slots.

The layouts are those of ``caches``: "index_k" (a scale per token), "v32" (fp32 scales per 128 channels, rope in bf16) and
"v4" (power-of-two scales per 64 channels, rope in bf16). A group with largest magnitude ``a`` gets the scale
``max(a, 1e-4) / 448``, or the next power of two. An invalid slot (below 0, or past the cache) is skipped; of rows with the
same slot the last is stored, whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...problem import checks, compare, paged
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import MLA, NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ..paged_rows import PagedRowsSpec
from ..rows import RowSizes, as_bytes, check_rows, draw_rows


@dataclass(frozen=True)
class QuantizePagedSpec(PagedRowsSpec):
    """What changes the code."""

    power_of_two: bool = False
    """Whether scales are rounded up to powers of two; always so in "v4"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("power_of_two", (True,) if self.layout == "v4" else (False, True))


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
        "(Tensor source, Tensor? rope, Tensor slots, Tensor(a!) cache, str layout='index_k', bool power_of_two=False) -> ()"
    )
    spec_type = QuantizePagedSpec
    sizes_type = QuantizePagedSizes
    minor = frozenset({"power_of_two", "slots", "page"})

    def specs(self, model: Model) -> Sequence[QuantizePagedSpec]:
        if model.attention != MLA:
            return ()
        keys = QuantizePagedSpec("index_k", model.index_head_dim, model.page)
        if model.kv_layout == NO_CACHE:
            return (keys,)
        return (QuantizePagedSpec(model.kv_layout, model.d_nope, model.page, power_of_two=model.kv_layout == "v4"), keys)

    def bind(self, *args: Any) -> tuple[QuantizePagedSpec, QuantizePagedSizes, Inputs]:
        source, rope, slots, cache, layout, power_of_two = args
        checks.one_of("layout", layout, paged.LAYOUTS)
        source = check_rows("source", source)
        tokens, width = source.shape
        if width not in paged.WIDTHS[layout]:
            raise InputError("source", f"{width} channels", " or ".join(map(str, paged.WIDTHS[layout])))
        known = paged.layout_of(layout, 1, width)
        inputs = {"source": source}
        if (rope is not None) != bool(paged.rope_of(known)):
            came, allowed = ("None", "a tensor") if rope is None else ("a tensor", "None")
            raise InputError("rope", came, f"{allowed} for layout {layout!r}")
        if rope is not None:
            inputs["rope"] = rope = check_rows("rope", rope, source)
            if rope.shape != (tokens, paged.rope_of(known)):
                raise InputError("rope", f"shape {list(rope.shape)}", f"shape {[tokens, paged.rope_of(known)]}")
        slots = paged.check_slots(slots, tokens, source)
        page = paged.check_cache("cache", cache, known.bytes_per_token, like=source)
        spec = QuantizePagedSpec(layout, width, page, paged.SLOT_NAMES[slots.dtype], power_of_two or layout == "v4")
        return spec, QuantizePagedSizes(tokens), {**inputs, "slots": slots, "cache": cache}

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
        }

    def reference(self, spec: QuantizePagedSpec, inputs: Inputs) -> Outputs:
        layout, cache = spec.cache, inputs["cache"].clone()
        values, scales = quantize_groups(inputs["source"], paged.group_of(layout), spec.power_of_two)
        paged.pack(layout, cache, inputs["slots"], values, scales, inputs.get("rope"))
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
        moved = 2 * (spec.width + paged.rope_of(layout)) + layout.bytes_per_token + paged.SLOTS[spec.slots].itemsize
        return Cost(3.0 * tokens * spec.width, tokens * moved, "fp32")

    def cases(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        repeated = Case(QuantizePagedSizes(70), "repeated")
        return [*(Case(QuantizePagedSizes(tokens)) for tokens in (37, 1, 130, 0)), repeated]

    def long_cases(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        return [Case(QuantizePagedSizes(tokens), "repeated") for tokens in (1000, 5000)]

    def options(self, spec: QuantizePagedSpec) -> Sequence[QuantizePagedSpec]:
        keys = QuantizePagedSpec("index_k", 128, spec.page)
        further = (replace(spec, power_of_two=True, slots="i64"), keys, replace(keys, width=64, power_of_two=True, slots="i64"))
        return (spec, *further)

    def workloads(self, spec: QuantizePagedSpec) -> Sequence[Case[QuantizePagedSizes]]:
        return [Case(QuantizePagedSizes(tokens)) for tokens in (4096, 64)]
