"""Kernels of the latent's prologue (Triton)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...gpu import Gpu
from ...problem import paged
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation
from ...problem.values import Scalar, next_power_of_two
from .. import rotated, rows
from .problem import PLAIN, LatentPrologueSizes, LatentPrologueSpec

_CLAIMS = 512  # rows of a block of `claim`
_FEW = 4096  # rows; up to these, comparing slots with all later ones takes no longer than the two launches of `claim`
_PLAIN_GROUP = 64  # channels of a plain row that the tile takes as a group: 448 is seven of them


class LatentPrologueKernels(Kernels[LatentPrologueSpec, LatentPrologueSizes]):
    """See the module's first lines."""

    backends = ("triton",)
    min_capability = 89

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return rows.PARAMETERS

    def constraints(self, spec: LatentPrologueSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from rows.values_per_thread(config, next_power_of_two(spec.width))

    def order(self, spec: LatentPrologueSpec, config: Config) -> str | None:
        """The norm's sum of squares."""
        return "" if spec.norm == "none" else f"triton-{config['block_t']}-{config['num_warps']}"

    def guesses(self, spec: LatentPrologueSpec, sizes: LatentPrologueSizes, gpu: Gpu) -> Iterable[Config]:
        # 16 values per thread; few tokens are spread over more, smaller blocks.
        if sizes.tokens < 8 * gpu.sms or spec.batch_invariant:  # of many 12.8 µs for 4096, of few 4.5 become 3
            yield Config.of("triton", block_t=1, num_warps=2)
        yield Config.of("triton", block_t=4, num_warps=4)

    def derived(self, spec: LatentPrologueSpec, config: Config) -> dict[str, Scalar]:
        names = _plain_names(spec) if spec.layout == PLAIN else paged.template_names(spec.cache, spec.width)
        return {
            **names,
            **rows.limits(),
            **(rotated.template_names(spec.d_rope, spec.d_rope, 0) if spec.d_rope else {}),
            "normalised": spec.normalised,
            "later": rotated.later(config),
            "claims": _CLAIMS,
        }

    def launches(
        self, spec: LatentPrologueSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        latent, cache, slots = inputs["latent"], inputs["cache"], inputs["slots"]
        tokens, slot_count = len(latent), cache.shape[0] * spec.page
        if not tokens:
            return ()
        many = tokens > _FEW
        owners = torch.empty(slot_count if many else 0, dtype=torch.int32, device=latent.device)
        tensors = [
            value for name in ("latent", "norm_weight", "cos_sin", "positions", "slots") if (value := inputs[name]) is not None
        ]
        counts = (tokens, *((len(inputs["cos_sin"]),) if spec.d_rope else ()), slot_count)
        strides = (cache.stride(0) * cache.element_size(), latent.stride(0))
        shared = (inputs["scale"],) if "scale" in inputs else ()
        args = (*tensors, cache, owners, *counts, *strides, inputs["eps"], *shared, int(many))
        claims = [(slots, owners, tokens, slot_count, last) for last in (0, 1)] if many else []
        return (
            *(Launch("claim", (-(-tokens // _CLAIMS), 1, 1), each) for each in claims),
            Launch("latent_prologue", (-(-tokens // config["block_t"]), 1, 1), args),
        )


def _plain_names(spec: LatentPrologueSpec) -> dict[str, Scalar]:
    """Where the fields of a plain row lie, as ``paged.template_names`` says it of FP8 caches: in bytes."""
    group = min(_PLAIN_GROUP, paged.tile_of(spec.width))
    stride, groups = 2 * (spec.width + spec.d_rope), spec.width // group
    return {
        "group": group,
        "groups": groups,
        "groups_padded": next_power_of_two(groups),
        "shared": 1,
        "d_rope": spec.d_rope,
        "scales": "none",
        **{"values_base": 0, "values_stride": stride, "scales_base": 0, "scales_stride": 0},
        **{"rope_base": 2 * spec.width, "rope_stride": stride},
    }
