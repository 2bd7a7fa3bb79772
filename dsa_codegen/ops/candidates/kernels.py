"""Kernels that note chosen tokens and their scores (Triton): a program takes some entries of a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem import checks
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar
from .problem import CandidatesSizes, CandidatesSpec


class CandidatesKernels(Kernels[CandidatesSpec, CandidatesSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_k", (256, 512, 1024, 2048), "entries of a row at a time"),
            Parameter("num_warps", (1, 2, 4, 8), "warps per program"),
        )

    def constraints(self, spec: CandidatesSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from exceeds("entries per thread", config["block_k"] / (32 * config["num_warps"]), 16)

    def guesses(self, spec: CandidatesSpec, sizes: CandidatesSizes, gpu: Gpu) -> Iterable[Config]:
        # Every entry is one load that waits for another: as many at once as there are.
        yield Config.of("triton", block_k=1024, num_warps=8)
        yield Config.of("triton", block_k=512, num_warps=4)

    def derived(self, spec: CandidatesSpec, config: Config) -> dict[str, Scalar]:
        return {}

    def launches(self, spec: CandidatesSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        logits, tokens = inputs["logits"], inputs["tokens"]
        if not len(tokens):
            return ()
        held = inputs["offset"], inputs["stride"] - inputs["block"], inputs["block"]
        grid = (len(tokens), -(-spec.topk // config["block_k"]), 1)
        args = (logits, tokens, outputs["out"], logits.shape[1], checks.step(logits, 0), *held)
        return (Launch("candidates", grid, args),)
