"""Sparse MLA, prefill: every query attends to its own list of tokens; all heads share one latent vector per token.

``s[h,i] = sm_scale · q[h] · kv[indices[i]]``, ``out[h] = Σ_i softmax(s[h])[i] · kv[indices[i], :512]``,
``lse[h] = ln Σ_i exp(s[h,i])`` (DeepSeek-V3.2-Exp report, section 2: MLA in its MQA mode). With a sink, ``exp(sink[h])``
joins the softmax's denominator; lse stays as it is. An index of -1 or >= the number of tokens means "no token".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, compare
from ..draw import Draw
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..presets import Model
from ..values import Scalar, Sizes, Spec

D_V = 512
"""Channels of a token that are also its value: 512 + 64 (V3.2), 512 + 0, and all of 448 + 64 (V4)."""
_CHUNK = 64  # queries; the reference gathers their rows, the draw ranks all tokens for each of them
_SPECIALISED_THREADS = 384  # one group of 128 gathers, one scores, one adds up


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """What changes the attention's code."""

    heads: int
    d_qk: int
    """Channels of queries and tokens: 576, or 512 where every channel is also value."""
    topk: int
    lengths: bool = False
    """Whether only the first ``lengths[query]`` entries of a list count."""
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        self.require_in("d_qk", (D_V, D_V + 64))
        self.require_range("topk", 1, 1 << 20)


@dataclass(frozen=True)
class AttentionSizes(Sizes):
    """What varies from call to call."""

    queries: int
    tokens: int
    # Beyond 64K tokens a random gather misses L2: 1143 µs become 1705 µs for 4096 queries on an H200.
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"queries": (1025,), "tokens": (65537,)}


# The configs to try in turn: the first without a violation is the default. The specialised pipeline pads to 64 heads and still
# wins below: 1968 µs against 2017 (Triton, 16 heads) and 1973 against 4143 (multistage, 32), the gather being the limit.
_SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=_SPECIALISED_THREADS)
_WIDE = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8)
_FEW = Config.of("triton", block_h=16, block_n=64, num_stages=3, num_warps=4)
_DEFAULTS = (_SPECIALISED, _WIDE, _WIDE.replace(block_n=32, num_stages=3), _WIDE.replace(block_h=32, block_n=32, num_stages=3))


class Attention(Op[AttentionSpec, AttentionSizes]):
    """See the module's first lines."""

    name = "attention"
    summary = "Sparse MLA prefill: every query attends to its own list of tokens, all heads sharing one latent vector."
    function = "sparse_attention"
    schema = (
        "(Tensor q, Tensor kv, Tensor indices, float sm_scale, Tensor? lengths=None, Tensor? sink=None) -> (Tensor, Tensor)"
    )
    spec_type = AttentionSpec
    sizes_type = AttentionSizes
    backends = ("tilelang", "triton")
    minor = frozenset({"lengths", "sink"})

    def specs(self, model: Model) -> Sequence[AttentionSpec]:
        return (AttentionSpec(model.heads, model.d_nope + model.d_rope, model.topk, sink=model.attn_sink),)

    def bind(self, *args: Any) -> tuple[AttentionSpec, AttentionSizes, Inputs]:
        q, kv, indices, sm_scale, lengths, sink = args
        q = checks.tensor("q", q, (None, None, None), torch.bfloat16)
        queries, heads, d_qk = q.shape
        tokens = checks.tensor("kv", kv, (None, 1, d_qk), torch.bfloat16, like=q).shape[0]
        topk = checks.tensor("indices", indices, (queries, 1, None), torch.int32, like=q).shape[2]
        if lengths is not None:
            checks.tensor("lengths", lengths, (queries,), torch.int32, like=q)
        if sink is not None:
            checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        if not 0 < sm_scale < math.inf:  # the running maximum is taken before the scale is applied
            raise InputError("sm_scale", str(sm_scale), "a positive number")
        spec = AttentionSpec(heads, d_qk, topk, lengths is not None, sink is not None)
        inputs = {"q": q, "kv": kv, "indices": indices, "sm_scale": sm_scale, "lengths": lengths, "sink": sink}
        return spec, AttentionSizes(queries, tokens), inputs

    def inputs(self, spec: AttentionSpec, case: Case[AttentionSizes], draw: Draw) -> Inputs:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        indices = _distinct(draw, queries, tokens, spec.topk)
        if case.distribution == "ragged":
            indices = _spoiled(draw, indices, tokens)
        return {
            # Scores of deviation 1. Values of 0.1, as FlashMLA's tests have them: rounding the weights to bf16 costs 2^-9
            # of a value where few tokens share them, and the limit's absolute part is 1e-3.
            "q": draw.normal(queries, spec.heads, spec.d_qk, dtype=torch.bfloat16, scale=10.0),
            "kv": draw.normal(tokens, 1, spec.d_qk, dtype=torch.bfloat16, scale=0.1),
            "indices": indices[:, None],
            "sm_scale": spec.d_qk**-0.5,
            "lengths": draw.integers(-1, spec.topk + 3, queries) if spec.lengths else None,
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }

    def reference(self, spec: AttentionSpec, inputs: Inputs) -> Outputs:
        q = inputs["q"]
        parts = [_attend(inputs, slice(first, first + _CHUNK)) for first in range(0, max(len(q), 1), _CHUNK)]
        return {"out": torch.cat([out for out, _ in parts]), "lse": torch.cat([lse for _, lse in parts])}

    def allocate(self, spec: AttentionSpec, inputs: Inputs) -> Outputs:
        shape, device = inputs["q"].shape[:2], inputs["q"].device
        return {
            "out": torch.empty(*shape, D_V, dtype=torch.bfloat16, device=device),
            "lse": torch.empty(shape, dtype=torch.float32, device=device),
        }

    def check(self, spec: AttentionSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(
            compare.close("out", outputs["out"], reference["out"], compare.ATTENTION),
            compare.close("lse", outputs["lse"], reference["lse"], compare.LSE),
        )

    def cost(self, spec: AttentionSpec, case: Case[AttentionSizes]) -> Cost:
        queries, tokens = case.sizes.queries, case.sizes.tokens
        chosen = min(spec.topk, tokens)
        flops = 2 * queries * spec.heads * chosen * (spec.d_qk + D_V)
        rows = min(tokens, queries * chosen)
        results = queries * spec.heads * (2 * D_V + 4)
        return Cost(flops, 2 * spec.d_qk * (queries * spec.heads + rows) + 4 * queries * spec.topk + results, "bf16")

    def cases(self, spec: AttentionSpec) -> Sequence[Case[AttentionSizes]]:
        sizes = ((1, 1), (5, 333), (2, 3000), (3, 0), (0, 40))
        ragged = [Case(AttentionSizes(queries, tokens), "ragged") for queries, tokens in sizes]
        return [Case(AttentionSizes(3, 200), "random"), *ragged]

    def options(self, spec: AttentionSpec) -> Sequence[AttentionSpec]:
        return tuple(replace(spec, lengths=lengths, sink=sink) for lengths in (False, True) for sink in (False, True))

    def workloads(self, spec: AttentionSpec) -> Sequence[Case[AttentionSizes]]:
        sizes = ((4096, 32768), (4096, 131072), (512, 32768), (512, 131072))
        return [Case(AttentionSizes(queries, tokens), "random") for queries, tokens in sizes]

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        tile = (
            Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
            Parameter("block_n", (32, 64), "tokens gathered per step"),
        )
        if backend == "triton":
            stages = Parameter(
                "num_stages", (2, 3, 5, 7), "stages of the loop: a tile in flight takes two, for indices and rows"
            )
            return (*tile, stages, Parameter("num_warps", (4, 8), "warps per block"))
        stages = Parameter("num_stages", (2, 3, 4, 5, 6), "tiles in flight")
        pipeline = Parameter(
            "pipeline", ("specialised", "multistage"), "warp groups with roles of their own, or all threads doing everything"
        )
        return (*tile, stages, Parameter("threads", (128, 256, _SPECIALISED_THREADS), "threads per block"), pipeline)

    def constraints(self, spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "triton":
            yield from _triton_constraints(spec, config)
        else:
            yield from _tilelang_constraints(spec, config, gpu)
        # A block that serves no head at all would only cost time.
        yield from exceeds("padded heads", config["block_h"], max(64 if _specialised(config) else 16, 2 * spec.heads - 1))
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def guesses(self, spec: AttentionSpec, sizes: AttentionSizes, gpu: Gpu) -> Iterable[Config]:
        return _DEFAULTS if spec.heads > 16 else (_SPECIALISED, _FEW, _FEW.replace(block_n=32), *_DEFAULTS)

    def derived(self, spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
        values: dict[str, Scalar] = {
            "d_v": D_V,
            "d_tail": spec.d_qk - D_V,
            "head_blocks": _head_blocks(spec, config),
        }
        if config.backend == "tilelang":
            gatherers = 128 if _specialised(config) else config["threads"]
            values["rounds"] = config["block_n"] * 8 // gatherers
        return values

    def launches(self, spec: AttentionSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, kv = inputs["q"], inputs["kv"]
        if not len(q):
            return ()
        if not len(kv):
            outputs["out"].zero_()
            outputs["lse"].fill_(-math.inf)
            return ()
        optional = [inputs[name] for name in ("lengths", "sink") if inputs[name] is not None]
        tensors = (q, kv, inputs["indices"], *optional, outputs["out"], outputs["lse"])
        scalars = (len(kv), inputs["sm_scale"]) if config.backend == "triton" else (inputs["sm_scale"],)
        return (Launch("attention", (len(q) * _head_blocks(spec, config), 1, 1), (*tensors, *scalars)),)


def _head_blocks(spec: AttentionSpec, config: Config) -> int:
    return -(-spec.heads // int(config["block_h"]))


def _specialised(config: Config) -> bool:
    return config.backend == "tilelang" and config["pipeline"] == "specialised"


def _triton_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    # The output's accumulator lies in registers; beyond 128 of 255 (block_h 64 on 4 warps) 1160 bytes spill.
    yield from exceeds("accumulator registers", config["block_h"] * D_V / (32 * config["num_warps"]), 128)


def _tilelang_constraints(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the TileLang template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    threads = config["threads"]
    if _specialised(config):
        wanted = {"block_h": 64, "block_n": 64, "num_stages": 2, "threads": _SPECIALISED_THREADS}
        for name, value in wanted.items():
            if config[name] != value:
                yield Violation(name, abs(config[name] / value - 1), f"{name}: the specialised pipeline is built for {value}")
        return
    yield from exceeds("threads", threads, 256)
    yield from exceeds("accumulator registers", config["block_h"] * D_V / threads, 128)
    if config["block_h"] < 64:  # mma.sync: each warp takes a share of the columns, at least 8
        yield from exceeds("columns per warp", 8, config["block_n"] * 32 / threads)


def _smem(spec: AttentionSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory per block, as the compilers report them, and up to 4 KB more."""
    block_h, block_n, stages = config["block_h"], config["block_n"], config["num_stages"]
    q, tile, weights = 2 * block_h * spec.d_qk, 2 * block_n * spec.d_qk, 2 * block_h * block_n
    small = 4096
    if config.backend == "tilelang":
        if _specialised(config):  # the weights take the tails' place, which is there without a tail too
            return q + 2 * (2 * block_n * D_V + weights) + small
        return q + stages * tile + weights + small
    if block_h < 64 or gpu.capability < 90 or gpu.capability >= 120:  # mma.sync: operands wait in registers
        return q + max(1, (stages - 1) // 2) * tile + weights + small
    # Half of the stages fetch indices. Datacentre Blackwell keeps a copy of q and of the weights besides.
    return q + max(2, (stages + 1) // 2) * tile + small + (64 * 1024 if gpu.capability >= 100 else 0)


def _distinct(draw: Draw, queries: int, tokens: int, topk: int) -> Tensor:
    """int32 [queries, topk]: random tokens, no token twice in a row of the tensor; -1 where the tokens are too few."""
    chosen = torch.full((queries, topk), -1, dtype=torch.int32, device=draw.device)
    for first in range(0, queries if tokens else 0, _CHUNK):
        rows = chosen[first : first + _CHUNK]
        order = draw.uniform(len(rows), tokens).topk(min(topk, tokens), dim=1).indices
        rows[:, : order.shape[1]] = order.int()
    return chosen


def _spoiled(draw: Draw, indices: Tensor, tokens: int) -> Tensor:
    """Every eighth entry invalid at random places, the first row empty, the second empty at its beginning."""
    queries, topk = indices.shape
    invalid = draw.integers(0, 4, queries, topk)
    worst = torch.tensor([-1, tokens, 2**31 - 1, -(2**31)], dtype=torch.int32, device=draw.device)
    spoiled = torch.where(draw.uniform(queries, topk) < 1 / 8, worst[invalid], indices)
    spoiled[:1] = -1
    spoiled[1:2, : topk // 2] = tokens
    return spoiled


def _attend(inputs: Inputs, rows: slice) -> tuple[Tensor, Tensor]:
    """(out, lse) of some queries in fp32."""
    q, kv, chosen = inputs["q"][rows].float(), inputs["kv"][:, 0], inputs["indices"][rows, 0].long()
    valid = (chosen >= 0) & (chosen < len(kv))
    if inputs["lengths"] is not None:
        valid &= torch.arange(chosen.shape[1], device=q.device) < inputs["lengths"][rows, None]
    latent = torch.zeros(*chosen.shape, q.shape[2], device=q.device)
    latent[valid] = kv[chosen[valid]].float()
    scores = torch.einsum("qhd,qkd->qhk", q, latent) * inputs["sm_scale"]
    scores = scores.masked_fill(~valid[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    total = lse if inputs["sink"] is None else torch.logaddexp(lse, inputs["sink"].expand_as(lse))
    weights = torch.exp(scores - total[..., None]).masked_fill(~valid[:, None], 0.0)
    return torch.einsum("qhk,qkd->qhd", weights, latent[..., :D_V]), lse


OP = Attention()
