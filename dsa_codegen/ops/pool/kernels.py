"""Kernels that pool keys (Triton): a program takes some blocks, whose tokens it reads twice, the second time from the L1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.channels import padded_to
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation
from ...problem.values import Scalar
from ..rows import PARAMETERS, values_per_thread
from .problem import PoolSizes, PoolSpec


class PoolKernels(Kernels[PoolSpec, PoolSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return PARAMETERS

    def constraints(self, spec: PoolSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from values_per_thread(config, padded_to(spec.head_dim))

    def guesses(self, spec: PoolSpec, sizes: PoolSizes, gpu: Gpu) -> Iterable[Config]:
        # Each token is one load behind the other: few values a thread, so that many blocks hide them. On an H200 256 blocks of
        # 16 tokens 16.5 us and 8192 34.6 us, with four blocks a program 31.6 and 39.2.
        yield Config.of("triton", block_t=1, num_warps=1)

    def derived(self, spec: PoolSpec, config: Config) -> dict[str, Scalar]:
        return {"head_dim_padded": padded_to(spec.head_dim)}

    def launches(self, spec: PoolSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        k, gates, first = inputs["k"], inputs["gates"], inputs["first"]
        if not len(first):
            return ()
        if len(k) < spec.pool:
            outputs["pooled"].zero_()
            return ()
        sizes = (len(first), len(k), k.stride(0), gates.stride(0))
        grid = (-(-len(first) // config["block_t"]), 1, 1)
        return (Launch("pool", grid, (k, gates, inputs["bias"], first, outputs["pooled"], *sizes)),)
