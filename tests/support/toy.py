"""A fixed search space for tests of records and tuning: the Triton indexer with a table of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsa_codegen.gpu import Gpu
from dsa_codegen.ops.indexer import Indexer, IndexerSizes, IndexerSpec
from dsa_codegen.problem.op import Case, Config, Parameter, Violation, exceeds
from dsa_codegen.problem.values import Scalar


class Toy(Indexer):
    """Renders the indexer's template, and has one backend and one default whatever the indexer has."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (
            Parameter("block_q", (1, 2, 4, 8, 16), "queries per block"),
            Parameter("block_n", (32, 64, 128, 256), "tokens per tile"),
            Parameter("num_stages", (2, 3, 4, 5), "tiles in flight"),
            Parameter("splits", (1, 2, 4, 8), "blocks that share a window", launch_only=True),
            Parameter("num_warps", (4, 8), "warps per block"),
        )

    def long_cases(self, spec: IndexerSpec) -> Sequence[Case[IndexerSizes]]:
        """One, and short: the indexer's take the CPU a second for every candidate."""
        return (Case(IndexerSizes(33, 200), "ragged"),)

    def constraints(self, spec: IndexerSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        columns = config["block_q"] * spec.heads
        smem = (columns + config["num_stages"] * config["block_n"]) * spec.head_dim
        yield from exceeds("smem", smem, gpu.smem_per_block, " B")
        yield from exceeds("columns", columns, 256)
        yield from exceeds("columns", 16, columns)
        yield from exceeds("warpgroup rows", config["num_warps"] * 16, config["block_n"])
        yield from exceeds("accumulator registers", config["block_n"] * columns / (32 * config["num_warps"]), 192)

    def guesses(self, spec: IndexerSpec, sizes: IndexerSizes, gpu: Gpu) -> Iterable[Config]:
        block_q = min(16, 256 // spec.heads)
        yield Config.of("triton", block_q=block_q, block_n=64, num_warps=4, num_stages=3, splits=1)

    def derived(self, spec: IndexerSpec, config: Config) -> dict[str, Scalar]:
        return super().derived(spec, config)


OP = Toy()
