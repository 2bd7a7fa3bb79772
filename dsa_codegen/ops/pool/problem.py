"""Keys of the indexer, pooled: one key for ``pool`` neighbouring tokens, by a learned gate.

``pooled[b, c] = Σ_i softmax_i(gates[first[b] + i, c] + bias[i, c]) · k[first[b] + i, c]`` over the ``pool`` tokens i of a block
(GLM-5.3-Flash: ``index_kpool``; gates are a projection of the tokens' hidden states, bias is learned by place in the block). A
mean is the same with gates and bias of zero. It is quantised and stored as any key is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...problem import channels, checks, compare
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import POOLS, Model
from ...problem.values import Sizes, Spec

GATES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in GATES.items()}
_BF16 = compare.Limit(similarity=5e-6, absolute=1e-4, relative=2.0**-8)


@dataclass(frozen=True)
class PoolSpec(Spec):
    """What changes the code."""

    head_dim: int
    pool: int
    gates: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("head_dim", channels.INDEX_WIDTHS)
        self.require_in("pool", POOLS)
        self.require_in("gates", GATES)


@dataclass(frozen=True)
class PoolSizes(Sizes):
    """What varies from call to call."""

    blocks: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {}


class PoolProblem(Problem[PoolSpec, PoolSizes]):
    """See the module's first lines."""

    name = "pool"
    summary = "Keys of the indexer pooled in blocks of tokens: means weighted by a softmax of gates, channel by channel."
    function = "pool_index_k"
    schema = "(Tensor k, Tensor gates, Tensor bias, Tensor first) -> Tensor"
    spec_type = PoolSpec
    sizes_type = PoolSizes
    minor = frozenset({"gates"})

    def specs_of(self, model: Model) -> Sequence[PoolSpec]:
        return () if model.pool == 1 else (PoolSpec(model.index_head_dim, model.pool),)

    def bind(self, *args: Any) -> tuple[PoolSpec, PoolSizes, Inputs]:
        k, gates, bias, first = args
        k = checks.rows("k", k, (None, None), torch.bfloat16)
        tokens, head_dim = k.shape
        gates = checks.rows("gates", gates, (tokens, head_dim), tuple(_NAMES), like=k)
        bias = checks.tensor("bias", bias, (None, head_dim), torch.float32, like=k)
        first = checks.tensor("first", first, (None,), torch.int32, like=k)
        spec = PoolSpec(head_dim, bias.shape[0], _NAMES[gates.dtype])
        return spec, PoolSizes(first.shape[0]), {"k": k, "gates": gates, "bias": bias, "first": first}

    def inputs(self, spec: PoolSpec, case: Case[PoolSizes], draw: Draw) -> Inputs:
        blocks = case.sizes.blocks
        tokens = blocks * spec.pool + 5
        return {
            "k": draw.normal(tokens, spec.head_dim, dtype=torch.bfloat16),
            "gates": draw.normal(tokens, spec.head_dim, dtype=GATES[spec.gates], scale=2.0),
            "bias": draw.normal(spec.pool, spec.head_dim),
            "first": draw.integers(-2, tokens + 2, blocks),
        }

    def reference(self, spec: PoolSpec, inputs: Inputs) -> Outputs:
        k, first = inputs["k"], inputs["first"].long()
        there = (first >= 0) & (first <= len(k) - spec.pool)
        place = first.masked_fill(~there, 0)[:, None] + torch.arange(spec.pool, device=k.device)
        if len(k) < spec.pool:
            return {"pooled": torch.zeros(len(first), spec.head_dim, device=k.device)}
        weight = (inputs["gates"].float()[place] + inputs["bias"]).softmax(1)
        return {"pooled": (weight * k.float()[place]).sum(1).masked_fill(~there[:, None], 0.0)}

    def allocate(self, spec: PoolSpec, inputs: Inputs) -> Outputs:
        return {"pooled": inputs["k"].new_empty(inputs["first"].shape[0], spec.head_dim)}

    def check(self, spec: PoolSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.close("pooled", outputs["pooled"], reference["pooled"], _BF16)

    def cost(self, spec: PoolSpec, case: Case[PoolSizes]) -> Cost:
        values = case.sizes.blocks * spec.head_dim
        return Cost(6.0 * values * spec.pool, values * (spec.pool * (2 + GATES[spec.gates].itemsize) + 2), "fp32")

    def cases(self, spec: PoolSpec) -> Sequence[Case[PoolSizes]]:
        return [Case(PoolSizes(blocks)) for blocks in (7, 1, 0)]

    def long_cases(self, spec: PoolSpec) -> Sequence[Case[PoolSizes]]:
        return [Case(PoolSizes(3000))]

    def options(self, spec: PoolSpec) -> Sequence[PoolSpec]:
        return (spec, replace(spec, gates="fp32", pool=4))

    def workloads(self, spec: PoolSpec) -> Sequence[Case[PoolSizes]]:
        return [Case(PoolSizes(blocks)) for blocks in (256, 8192)]
