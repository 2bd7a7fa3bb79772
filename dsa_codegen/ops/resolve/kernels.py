"""Kernels that look a choice up in a page table and close the gaps (Triton): a program takes a row, in registers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import ResolveSizes, ResolveSpec


class ResolveKernels(Kernels[ResolveSpec, ResolveSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (Parameter("num_warps", (1, 2, 4, 8, 16), "warps per row"),)

    def constraints(self, spec: ResolveSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        # A token, its slot and its places among both kinds lie in registers.
        yield from exceeds("entries per thread", next_power_of_two(spec.topk) / (32 * config["num_warps"]), 16)

    def guesses(self, spec: ResolveSpec, sizes: ResolveSizes, gpu: Gpu) -> Iterable[Config]:
        # Few rows: latency counts, and more warps load more of the table at once.
        for entries in (4, 8, 16) if sizes.rows <= gpu.sms else (8, 16):
            warps = max(1, next_power_of_two(spec.topk) // (32 * entries))
            if warps <= 16:
                yield Config.of("triton", num_warps=warps)

    def derived(self, spec: ResolveSpec, config: Config) -> dict[str, Scalar]:
        return {"block_k": next_power_of_two(spec.topk)}

    def launches(self, spec: ResolveSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        chosen, table = inputs["chosen"], inputs["page_table"]
        rows = len(chosen)
        if not rows:
            return ()
        held = (inputs["offset"], inputs["stride"], inputs["block"], inputs["tokens"])
        args = (chosen, table, *outputs.values(), rows // len(table), table.shape[1], table.stride(0), *held)
        return (Launch("resolve", (rows, 1, 1), args),)
