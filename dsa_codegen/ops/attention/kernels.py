"""Kernels of sparse MLA prefill: designs in CUDA C++, groups with roles in TileLang, tiles in Triton; which serves when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.channels import usual
from ...problem.checks import pieces, step
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation
from ...problem.values import Scalar
from . import clusters, designs, few, pairs, sweep, tiles
from .parameters import PARAMETERS
from .problem import AttentionSizes, AttentionSpec

_FP8_CAPABILITY = 89


class AttentionKernels(Kernels[AttentionSpec, AttentionSizes]):
    """See the module's first lines."""

    backends = ("cuda", "tilelang", "triton")
    budgeted = True

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return PARAMETERS[backend]

    def constraints(self, spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        refused = [*_channels(spec, config), *_math(spec, config, gpu)][:1]
        if refused:
            return refused
        return designs.constraints(spec, config, gpu) if config.backend == "cuda" else tiles.constraints(spec, config, gpu)

    def order(self, spec: AttentionSpec, config: Config) -> str | None:
        """A query's list tile by tile, by blocks that have nothing else; a union of lists is in its neighbours' order, a sorted
        one in that of its round."""
        return designs.order(spec, config) if config.backend == "cuda" else tiles.order(config)

    def guesses(self, spec: AttentionSpec, sizes: AttentionSizes, gpu: Gpu) -> Iterable[Config]:
        narrow = (tiles.FEW, tiles.FEW.replace(block_n=32)) if spec.heads <= 16 else ()
        if spec.math == "fp8":  # in Triton values widen: wider tiles spill
            narrow = (tiles.FEW.replace(num_warps=8), *narrow[1:]) if narrow else ()
            return (pairs.FP8, *narrow, *tiles.DEFAULTS[2:], *tiles.DEFAULTS)
        sorts = sweep.pays(spec, sizes)
        if spec.heads <= few.HEADS:
            rings = few.rings(spec)
            swept = tuple(ring.replace(sweep=True) for ring in rings) if sorts else ()
            return (*swept, *rings, tiles.SPECIALISED, *narrow, *tiles.DEFAULTS)
        others = (clusters.CONFIGS, tiles.DEFAULTS) if spec.topk >= clusters.LEAST_TOPK else (tiles.DEFAULTS, clusters.CONFIGS)
        swept = (pairs.CONFIG.replace(sweep=True),) if sorts else ()
        best = pairs.best(spec, sizes)
        return (*swept, best, *others[0], *others[1]) if spec.topk >= pairs.LEAST_TOPK else (*others[0], *others[1], best)

    def derived(self, spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
        return designs.derived(spec, config) if config.backend == "cuda" else tiles.derived(spec, config)

    def launches(self, spec: AttentionSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, kv, indices = inputs["q"], inputs["kv"], inputs["indices"]
        if not len(q):
            return ()
        if not len(kv):
            outputs["out"].zero_()
            for name in outputs.keys() - {"out"}:
                outputs[name].fill_(-math.inf)
            return ()
        optional = [inputs[name] for name in ("lengths", "sink") if inputs[name] is not None]
        scales = [inputs[name] for name in ("q_scale", "kv_scale") if spec.math == "fp8"]
        tensors = (q, kv, *scales, indices, *optional, *outputs.values())
        if config.backend == "cuda":
            return designs.launches(spec, config, tensors, inputs, outputs, gpu)
        grid = (len(q) * tiles.head_blocks(spec, config), 1, 1)
        if config.backend == "tilelang":  # reads sizes and strides from the tensors
            return (Launch("attention", grid, (*tensors, inputs["sm_scale"])),)
        strides = (pieces(q, 0), pieces(q, 1), pieces(kv, 0), step(indices, 0))
        return (Launch("attention", grid, (*tensors, len(kv), spec.topk, *strides, inputs["sm_scale"])),)


def _channels(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    if config.backend != "triton" and not (usual(spec.d_qk, spec.d_v) or (config.backend == "cuda" and few.is_narrow(spec))):
        reason = f"channels: {spec.d_qk} of {spec.d_v} are served by the Triton template, the others take 512 + 64 or 512"
        yield Violation("channels", 1.0, f"{reason}, up to {few.HEADS} heads a value of 64, 128, 192 or 256")


def _math(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if spec.math == "fp8" and (config.backend == "tilelang" or gpu.capability < _FP8_CAPABILITY):
        served = f"in CUDA C++ and Triton, from sm_{_FP8_CAPABILITY} on"
        yield Violation("math", 1.0, f"math: FP8 products are served {served}, not by {config.backend} on {gpu.name}")
