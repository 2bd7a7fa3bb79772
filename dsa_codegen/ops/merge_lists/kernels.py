"""Kernels that put candidates in order (Triton): a program takes entries of one part's row, and bisects the other lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar
from .problem import MOST_PARTS, MergeListsSizes, MergeListsSpec


class MergeListsKernels(Kernels[MergeListsSpec, MergeListsSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_k", (MOST_PARTS, 256, 512, 1024, 2048), "entries of a list at a time, and parts at most"),
            Parameter("num_warps", (1, 2, 4, 8), "warps per program"),
        )

    def constraints(self, spec: MergeListsSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from exceeds("entries per thread", config["block_k"] / (32 * config["num_warps"]), 16)

    def guesses(self, spec: MergeListsSpec, sizes: MergeListsSizes, gpu: Gpu) -> Iterable[Config]:
        # Bisection is loads that wait for each other: few entries a thread, many programs.
        yield Config.of("triton", block_k=512, num_warps=8)
        yield Config.of("triton", block_k=256, num_warps=4)

    def derived(self, spec: MergeListsSpec, config: Config) -> dict[str, Scalar]:
        halvings = spec.topk.bit_length()
        return {"halvings": halvings, "half": 1 << (halvings - 1)}

    def launches(self, spec: MergeListsSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        candidates = inputs["candidates"]
        parts, rows = candidates.shape[:2]
        if not rows:
            return ()
        grid = (rows, -(-spec.topk // config["block_k"]), parts)
        return (Launch("merge_lists", grid, (candidates, *outputs.values(), rows, parts)),)
