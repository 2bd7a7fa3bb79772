"""Kernels of the indexer's prologue (Triton): one launch, whose first programs take keys, the others heads of queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.paged import template_names
from ...problem.values import Scalar, next_power_of_two
from .. import rotated
from ..rows import limits
from .problem import NO_NORM, IndexPrologueSizes, IndexPrologueSpec

_CLAIMS = 512  # rows of a block of `claim`
_FEW = 8192  # rows; up to these, comparing slots with all later ones hides behind the queries


class IndexPrologueKernels(Kernels[IndexPrologueSpec, IndexPrologueSizes]):
    """See the module's first lines."""

    backends = ("triton",)
    min_capability = 89

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_h", (1, 2, 4, 8, 16, 32, 64), "heads of a token per program"),
            Parameter("block_t", (1, 2, 4, 8, 16), "keys per program"),
            Parameter("num_warps", (1, 2, 4, 8), "warps per program"),
        )

    def constraints(self, spec: IndexPrologueSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from exceeds("heads", config["block_h"], next_power_of_two(max(spec.heads, 1)))
        yield from rotated.fits_registers(config, max(config["block_h"], config["block_t"]), next_power_of_two(spec.head_dim))

    def order(self, spec: IndexPrologueSpec, config: Config) -> str | None:
        """Keys are summed for their norm; queries, and rotations of either, take sums of pairs alone."""
        return "" if spec.norm == NO_NORM else f"triton-{config['block_t']}-{config['num_warps']}"

    def guesses(self, spec: IndexPrologueSpec, sizes: IndexPrologueSizes, gpu: Gpu) -> Iterable[Config]:
        # 4096 tokens of 64 heads on an H200: a warp for 8 heads takes 43 us, 4 warps for 16 take 52; with the Hadamard
        # rotation, whose halves cross a program's warps, 205 and 398. Few tokens are spread over more, smaller programs.
        heads = next_power_of_two(max(spec.heads, 1))
        few = sizes.tokens * heads < 16 * gpu.sms
        if spec.batch_invariant:  # 64 tokens: 3.7 us, where a warp takes 7.6
            yield Config.of("triton", block_h=min(4 if few else 16, heads), block_t=1, num_warps=4)
        if few:
            yield Config.of("triton", block_h=min(8, heads), block_t=1, num_warps=4)
        yield Config.of("triton", block_h=min(8, heads), block_t=1, num_warps=1)

    def derived(self, spec: IndexPrologueSpec, config: Config) -> dict[str, Scalar]:
        first = 0 if spec.rope_first else spec.head_dim - spec.d_rope
        log2 = next_power_of_two(spec.head_dim).bit_length() - 1
        return {
            **template_names(spec.cache, spec.head_dim),
            **limits(),
            **rotated.template_names(spec.d_rope, spec.head_dim, first),
            "head_blocks": -(-spec.heads // int(config["block_h"])),
            "heads_masked": spec.heads % int(config["block_h"]) != 0,
            "later": rotated.later(config),
            "claims": _CLAIMS,
            "weight_factor": repr(spec.weight_factor),
            "turns": log2 if spec.hadamard else 0,
            "tree": log2 if spec.hadamard or spec.rotary == "interleaved" else 0,
            "turn_factor": repr(spec.head_dim**-0.5),
        }

    def launches(self, spec: IndexPrologueSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, k, cache, slots = (inputs[name] for name in ("q", "k", "cache", "slots"))
        tokens, slot_count = len(q), cache.shape[0] * spec.page
        if not tokens:
            return ()
        many = tokens > _FEW
        owners = torch.empty(slot_count if many else 0, dtype=torch.int32, device=q.device)
        named = ("q", "weights", "k", "norm_weight", "norm_bias", "cos_sin", "positions", "slots", "cache")
        tensors = [inputs[name] for name in named if inputs[name] is not None]
        strides = (cache.stride(0), q.stride(0), inputs["weights"].stride(0), k.stride(0))
        counts = (tokens, *((len(inputs["cos_sin"]),) if spec.d_rope else ()), slot_count)
        args = (*tensors, outputs["values"], outputs["folded"], owners, *counts, *strides, inputs["eps"], int(many))
        programs = -(-tokens // config["block_t"]) + tokens * -(-spec.heads // int(config["block_h"]))
        claims = [(slots, owners, tokens, slot_count, last) for last in (0, 1)] if many else []
        return (
            *(Launch("claim", (-(-tokens // _CLAIMS), 1, 1), each) for each in claims),
            Launch("index_prologue", (programs, 1, 1), args),
        )
