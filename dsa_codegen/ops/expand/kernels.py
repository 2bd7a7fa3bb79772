"""Kernels that write the tokens of chosen blocks (Triton): a program takes a row, in registers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import ExpandSizes, ExpandSpec


class ExpandKernels(Kernels[ExpandSpec, ExpandSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (Parameter("num_warps", (1, 2, 4, 8, 16), "warps per row"),)

    def constraints(self, spec: ExpandSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        yield from exceeds("entries per thread", next_power_of_two(spec.width) / (32 * config["num_warps"]), 32)

    def guesses(self, spec: ExpandSpec, sizes: ExpandSizes, gpu: Gpu) -> Iterable[Config]:
        yield Config.of("triton", num_warps=min(8, max(1, next_power_of_two(spec.width) // 256)))
        yield Config.of("triton", num_warps=16)

    def derived(self, spec: ExpandSpec, config: Config) -> dict[str, Scalar]:
        padded = {"block_k": next_power_of_two(spec.width), "block_b": next_power_of_two(spec.blocks)}
        return {"width": spec.width, **padded}

    def launches(self, spec: ExpandSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        chosen, table = inputs["chosen"], inputs["page_table"]
        if not len(chosen):
            return ()
        rows = [chosen, inputs["block_starts"], inputs["starts"], inputs["ends"]]
        paging = (1, 0, 0, 1) if table is None else (len(chosen) // len(table), table.shape[1], table.stride(0), inputs["page"])
        tables = () if table is None else (table,)
        return (Launch("expand", (len(chosen), 1, 1), (*rows, *tables, *outputs.values(), *paging)),)
