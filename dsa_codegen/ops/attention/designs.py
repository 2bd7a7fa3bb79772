"""The designs of the CUDA template: which one a config asks for, what it cannot do, what its template is told, its launches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...gpu import Gpu
from ...problem.checks import step
from ...problem.op import Config, Inputs, Launch, Outputs, Violation, exceeds
from ...problem.values import Scalar
from .. import pair
from . import clusters, few, pairs, staying
from .problem import AttentionSpec

_CONSTRAINTS = {
    "few": few.constraints,
    "pair": pairs.constraints,
    "cluster": clusters.constraints,
    "fp8": pairs.fp8_constraints,
}
_SMEM = {"few": few.smem, "pair": pairs.smem, "cluster": clusters.smem, "fp8": pairs.fp8_smem}


def design_of(spec: AttentionSpec, config: Config) -> str:
    """Which a config asks for."""
    if spec.math == "fp8":
        return "fp8"
    if spec.heads <= few.HEADS:
        return "few"
    return "pair" if config["num_stages"] == pairs.CONFIG["num_stages"] else "cluster"


def constraints(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the design of a config cannot do."""
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the CUDA template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    design = design_of(spec, config)
    yield from _CONSTRAINTS[design](spec, config)
    yield from exceeds("smem", _SMEM[design](spec, config), gpu.smem_per_block, " B")


def order(spec: AttentionSpec, config: Config) -> str | None:
    """Tiles of 64 tokens, however many wait; none where lists are sorted or joined."""
    if config["sweep"]:
        return None
    design = design_of(spec, config)
    if design == "pair":  # whose values are added first
        return "pair-interleaved" if config["interleave"] else "pair"
    return None if design == "few" and spec.share > 1 else design


def derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    design = design_of(spec, config)
    if design == "pair":
        return {"design": design, **pairs.derived(spec, config)}
    values: dict[str, Scalar] = {
        "threads": pair.THREADS,
        "producer_registers": pair.gatherers_registers(config["consumer_registers"]),
        "smem": _SMEM[design](spec, config),
        "design": design,
    }
    if design == "fp8":
        return values
    return {**values, **(few if design == "few" else clusters).derived(spec, config)}


def launches(
    spec: AttentionSpec, config: Config, tensors: Sequence[Any], inputs: Inputs, outputs: Outputs, gpu: Gpu
) -> Sequence[Launch]:
    """Blocks that stay, with one query after another.

    Args:
        tensors: those of the call, in the template's order.
    """
    design = design_of(spec, config)
    if design in staying.LAUNCHES:
        return staying.LAUNCHES[design](spec, config, inputs, outputs, gpu)
    q, kv, indices = inputs["q"], inputs["kv"], inputs["indices"]
    scalars = (len(q), len(kv), spec.topk, step(q, 0), step(q, 1), step(kv, 0), step(indices, 0), inputs["sm_scale"])
    blocks = 2 * min(len(q), max(gpu.sms // 2, 1))  # clusters take one query after another
    if design == "fp8":  # 64 heads of a query after another
        blocks = min(len(q) * spec.heads // pair.HEADS, gpu.sms)
    return (Launch("attention", (blocks, 1, 1), (*tensors, *scalars)),)
