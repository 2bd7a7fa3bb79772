"""Sparse MLA, decode: the newest queries of each sequence attend to listed slots of a paged FP8 latent KV cache.

``s[h,i] = sm_scale · q[h] · kv[indices[i]]``, ``out[h] = Σ_i softmax(s[h])[i] · kv[indices[i], :512]``,
``lse[h] = ln Σ_i exp(s[h,i])`` (DeepSeek-V3.2-Exp report, section 2: MLA in its MQA mode), where ``kv`` is the latent that a
slot states, rounded to bf16: the results are those of prefill attention on the BF16 latents read back from the cache. With a
sink, ``exp(sink[h])`` joins the softmax's denominator; lse stays as it is. A slot below 0 or past the cache means "no token".
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, compare
from ..caches import KvLayout, KvV4Layout, KvV32Layout, kv_layout, quantize_groups, tokens_of, valid_slots
from ..draw import Draw
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..paged import check_cache
from ..presets import KV_LAYOUTS, Model
from ..values import Scalar, Sizes, Spec
from ..waves import until_done

_FILL = 1 << 16  # tokens of a cache that are drawn and packed at a time
_COMBINE_D, _COMBINE_S = 128, 16  # channels and parts of a step of `combine`: all its loads are in flight at once
_GLUON_PARTS = 8  # of the Gluon template's, whose program has all channels
_GLUON_TILE = 64  # heads of a block, and entries per step: what one warpgroup instruction takes
# Per thread: together they fill the register file, lead takes 208. The accumulators are 128 of them.
_GLUON_REGISTERS = {"registers": 128, "follow_registers": 160, "produce_registers": 72}
_PARTIAL_BYTES = 1 << 30  # of the parts that splits leave, at most
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class AttentionPagedSpec(Spec):
    """What changes the code."""

    heads: int
    topk: int
    kv_layout: str = "v32"
    page: int = 64
    lengths: bool = False
    """Whether only the first ``lengths`` entries of a row count."""
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        self.require_range("topk", 1, 1 << 20)
        self.require_in("kv_layout", KV_LAYOUTS)
        self.require_range("page", 1, 1024)

    @property
    def layout(self) -> KvLayout:
        """How a block of the cache is laid out."""
        return kv_layout(self.kv_layout, self.page)


@dataclass(frozen=True)
class AttentionPagedSizes(Sizes):
    """What varies from call to call."""

    batch: int
    next_n: int
    tokens: int
    """Slots of the cache."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"batch": (2, 17, 65)}


class AttentionPaged(Op[AttentionPagedSpec, AttentionPagedSizes]):
    """See the module's first lines."""

    name = "attention_paged"
    summary = "Sparse MLA decode: the newest queries attend to listed slots of a paged FP8 latent KV cache."
    function = "sparse_attention_paged"
    schema = (
        "(Tensor q, Tensor cache, Tensor indices, float sm_scale, Tensor? lengths=None, Tensor? sink=None) -> (Tensor, Tensor)"
    )
    spec_type = AttentionPagedSpec
    sizes_type = AttentionPagedSizes
    backends = ("gluon", "triton")
    minor = frozenset({"lengths", "sink", "page"})

    def specs(self, model: Model) -> Sequence[AttentionPagedSpec]:
        layout = kv_layout(model.kv_layout, model.page)
        if (model.d_nope, model.d_rope) != (layout.d_nope, layout.d_rope):
            return ()
        return (AttentionPagedSpec(model.heads, model.topk, model.kv_layout, model.page, sink=model.attn_sink),)

    def bind(self, *args: Any) -> tuple[AttentionPagedSpec, AttentionPagedSizes, Inputs]:
        q, cache, indices, sm_scale, lengths, sink = args
        q = checks.tensor("q", q, (None, None, None, None), torch.bfloat16)
        batch, next_n, heads, d_qk = q.shape
        layout = _layout_of(d_qk)
        page = check_cache("cache", cache, layout.bytes_per_token, like=q)
        topk = checks.tensor("indices", indices, (batch, next_n, None), torch.int32, like=q).shape[2]
        if lengths is not None:
            per_query = isinstance(lengths, Tensor) and lengths.dim() == 2
            checks.tensor("lengths", lengths, (batch, next_n) if per_query else (batch,), torch.int32, like=q)
        if sink is not None:
            checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        if not 0 < sm_scale < math.inf:  # the running maximum is taken after scaling, of numbers that must stay ordered
            raise InputError("sm_scale", str(sm_scale), "a positive number")
        spec = AttentionPagedSpec(heads, topk, layout.name, page, lengths is not None, sink is not None)
        inputs = {"q": q, "cache": cache, "indices": indices, "sm_scale": sm_scale, "lengths": lengths, "sink": sink}
        return spec, AttentionPagedSizes(batch, next_n, cache.shape[0] * page), inputs

    def inputs(self, spec: AttentionPagedSpec, case: Case[AttentionPagedSizes], draw: Draw) -> Inputs:
        batch, next_n = case.sizes.batch, case.sizes.next_n
        layout, blocks = spec.layout, -(-case.sizes.tokens // spec.page)
        indices = _indices(draw, batch * next_n, blocks * spec.page, spec.topk)
        lengths = None
        if case.distribution == "ragged":
            indices = _spoiled(draw, indices, blocks * spec.page)
        if spec.lengths:
            per_query = case.sizes.batch % 2 == 0
            lengths = draw.integers(-1, spec.topk + 3, *((batch, next_n) if per_query else (batch,)))
        return {
            "q": draw.normal(batch, next_n, spec.heads, layout.d_nope + layout.d_rope, dtype=torch.bfloat16),
            "cache": _cache(layout, blocks, draw),
            "indices": indices.view(batch, next_n, spec.topk),
            "sm_scale": (layout.d_nope + layout.d_rope) ** -0.5,
            "lengths": lengths,
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }

    def reference(self, spec: AttentionPagedSpec, inputs: Inputs) -> Outputs:
        outputs = self.allocate(spec, inputs)
        out = torch.zeros_like(outputs["out"], dtype=torch.float32)
        lse = torch.full_like(outputs["lse"], -math.inf)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:2])).tolist():
            latent = _listed(spec, inputs, *at)
            scores = inputs["q"][tuple(at)].float() @ latent.T * inputs["sm_scale"]
            lse[tuple(at)] = total = scores.logsumexp(-1)
            if inputs["sink"] is not None:
                total = torch.logaddexp(total, inputs["sink"])
            out[tuple(at)] = (scores - total[:, None]).exp() @ latent[:, : spec.layout.d_v]
        return {"out": out, "lse": lse}

    def allocate(self, spec: AttentionPagedSpec, inputs: Inputs) -> Outputs:
        shape, device = inputs["q"].shape[:3], inputs["q"].device
        return {
            "out": torch.empty(*shape, spec.layout.d_v, dtype=torch.bfloat16, device=device),
            "lse": torch.empty(shape, dtype=torch.float32, device=device),
        }

    def check(self, spec: AttentionPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.worst(
            compare.close("out", outputs["out"], reference["out"], compare.ATTENTION),
            compare.close("lse", outputs["lse"], reference["lse"], compare.LSE),
        )

    def cost(self, spec: AttentionPagedSpec, case: Case[AttentionPagedSizes]) -> Cost:
        layout, rows = spec.layout, case.sizes.batch * case.sizes.next_n
        d_qk, chosen = layout.d_nope + layout.d_rope, min(spec.topk, case.sizes.tokens)
        flops = 2 * rows * spec.heads * chosen * (d_qk + layout.d_v)
        gathered = min(case.sizes.tokens, rows * chosen) * layout.bytes_per_token
        return Cost(flops, gathered + 4 * rows * spec.topk + rows * spec.heads * (2 * d_qk + 2 * layout.d_v + 4), "bf16")

    def cases(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        sizes = ((2, 2, 333), (1, 1, 40), (3, 1, 0), (0, 1, 64))
        return [Case(AttentionPagedSizes(1, 2, 300), "random"), *(Case(AttentionPagedSizes(*size), "ragged") for size in sizes)]

    def long_cases(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        return [Case(AttentionPagedSizes(75, 2, 3000), "ragged")]  # more blocks than a GPU has SMs

    def options(self, spec: AttentionPagedSpec) -> Sequence[AttentionPagedSpec]:
        return tuple(replace(spec, lengths=lengths, sink=sink) for lengths in (False, True) for sink in (False, True))

    def workloads(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        # Far more tokens than fit in L2 where a batch would bring them.
        sizes = ((64, 1, 1 << 20), (1, 1, 1 << 16), (8, 1, 1 << 18), (128, 1, 1 << 20))
        return [Case(AttentionPagedSizes(*size), "random") for size in sizes]

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        meaning = "blocks that share a row's entries"
        if backend == "gluon":
            return (Parameter("splits", (0, *_SPLITS), f"{meaning}; 0: as many as end soonest", launch_only=True),)
        return (
            Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
            Parameter("block_n", (16, 32, 64), "entries gathered per step"),
            Parameter("num_stages", (2, 3), "stages of the loop over tiles"),
            Parameter("num_warps", (4, 8), "warps per block"),
            Parameter("dequantize", ("bits", "cast"), "e4m3 -> bf16 by placing bits, or by the compiler's conversion"),
            Parameter("splits", _SPLITS, meaning, launch_only=True),
        )

    def constraints(self, spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "gluon":
            if gpu.capability != 90:
                reason = f"capability: the Gluon template is Hopper's, {gpu.name} is sm_{gpu.capability}"
                yield Violation("capability", 1.0, reason)
            yield from exceeds("smem", _gluon_smem(spec), gpu.smem_per_block, " B")
            return
        if config["dequantize"] == "cast":
            yield from exceeds("capability for e4m3 conversion", 89, gpu.capability)
        yield from exceeds("padded heads", config["block_h"], max(16, 2 * spec.heads - 1))
        # Accumulator and tile lie in registers: beyond 256 of their values per thread they spill on every architecture.
        values = (config["block_h"] + config["block_n"]) * spec.layout.d_v / (32 * config["num_warps"])
        yield from exceeds("values per thread", values, 256)
        if isinstance(spec.layout, KvV4Layout) and not _warpgroups(config, gpu):
            yield from exceeds("heads per block of the v4 layout", config["block_h"], 16)  # at 32, 440 bytes spill
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def guesses(self, spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> Iterable[Config]:
        wide = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8, dequantize="bits", splits=1)
        some = wide.replace(block_h=32)
        few = wide.replace(block_h=16, block_n=32, num_warps=4)
        widest = wide if gpu.capability == 90 else some  # 64 heads spill 216 to 304 bytes elsewhere
        best = few if spec.heads <= 16 else some if spec.heads <= 32 else widest
        # On an H100 at batch 64 with 128 heads: 101 µs against 194.
        yield Config.of("gluon", splits=0)
        for config in (best, best.replace(block_n=32), some, few, few.replace(block_n=16)):
            yield config.replace(splits=_splits(spec, config, sizes, gpu))

    def derived(self, spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
        layout = spec.layout
        names: dict[str, Scalar] = {
            "d_nope": layout.d_nope,
            "d_rope": layout.d_rope,
            "d_v": layout.d_v,
            "group": layout.group,
            "power_of_two": isinstance(layout, KvV4Layout),
            "nope_base": layout.nope.base,
            "rope_base": layout.rope.base,
            "token_stride": layout.nope.stride,
            "scales_base": layout.scales.base,
            "scales_stride": layout.scales.stride,
            "head_blocks": _head_blocks(spec, config),
            "combine_d": _COMBINE_D,
            "combine_s": _COMBINE_S,
        }
        if config.backend == "gluon":
            chunks = [f"acc{chunk}" for chunk in range(layout.d_v // layout.group)]
            half = len(chunks) // 2
            names |= {"left": ", ".join(chunks[:half]), "right": ", ".join(chunks[half:])}
            names |= {"combine_s": _GLUON_PARTS, "block_h": _GLUON_TILE, "block_n": _GLUON_TILE, **_GLUON_REGISTERS}
        return names

    def launches(
        self, spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        q, cache, out, lse = inputs["q"], inputs["cache"], outputs["out"], outputs["lse"]
        batch, next_n = q.shape[:2]
        rows, d_v = batch * next_n, spec.layout.d_v
        if not rows:
            return ()
        if not len(cache):
            out.zero_()
            lse.fill_(-math.inf)
            return ()
        # Records are tuned for few queries per sequence; a prompt's thousands would make the parts take tens of GB.
        most = max(1, _PARTIAL_BYTES // (4 * d_v * rows * spec.heads))
        blocks = _head_blocks(spec, config) * rows
        whole, splits = 0, min(config["splits"], most)
        last: tuple[int, ...] = ()
        combined = (rows * spec.heads, d_v // _COMBINE_D, 1)
        if config.backend == "gluon":
            whole, splits = (0, splits) if splits else _shared_out(spec, blocks, gpu)
            combined, last = ((blocks - whole) * min(spec.heads, _GLUON_TILE), 1, 1), (whole,)
        parts = combined[0] * splits if splits > 1 else 0
        partial_out = torch.empty(parts, d_v, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        lengths, sink = inputs["lengths"], inputs["sink"]
        optional = [tensor for tensor in (lengths, sink) if tensor is not None]
        per_length = next_n if lengths is not None and lengths.dim() == 1 else 1
        tensors = (q, cache, inputs["indices"], *optional, out, lse, partial_out, partial_lse)
        scalars = (len(cache) * spec.page, cache.stride(0), per_length, splits, inputs["sm_scale"])
        main = Launch("attention_paged", (whole + (blocks - whole) * splits, 1, 1), (*tensors, *scalars, *last))
        if splits == 1:
            return (main,)
        joined = (*((sink,) if sink is not None else ()), partial_out, partial_lse, out, lse, splits, *last)
        return (main, Launch("combine", combined, joined))


def _layout_of(d_qk: int) -> type[KvV32Layout | KvV4Layout]:
    for layout in (KvV32Layout, KvV4Layout):
        if layout.d_nope + layout.d_rope == d_qk:
            return layout
    raise InputError("q", f"{d_qk} channels", "576 for the 656-byte cache, 512 for the 584-byte one")


def _head_blocks(spec: AttentionPagedSpec, config: Config) -> int:
    return -(-spec.heads // (_GLUON_TILE if config.backend == "gluon" else int(config["block_h"])))


def _splits(spec: AttentionPagedSpec, config: Config, sizes: AttentionPagedSizes, gpu: Gpu) -> int:
    """The number that ends soonest, in units of a tile: whole waves of blocks, each with a start, and joining the parts."""
    blocks = max(1, sizes.batch * sizes.next_n) * _head_blocks(spec, config)
    tiles = -(-spec.topk // config["block_n"])
    resident = gpu.sms * (8 // config["num_warps"])

    def duration(splits: int) -> float:
        joining = 1 + splits / 16 if splits > 1 else 0
        return until_done(blocks, resident, tiles, 0, splits, start=1.5) + joining

    return min((splits for splits in _SPLITS if splits <= tiles), key=duration)


@functools.lru_cache(maxsize=1 << 10)
def _shared_out(spec: AttentionPagedSpec, blocks: int, gpu: Gpu) -> tuple[int, int]:
    """(blocks that take all entries of their row, programs that each of the others is split into), so that all end soonest.

    The unit is a tile, 3 µs on an H100: a program starts in 2, joining takes 1, and a quarter for every MB of parts.
    """
    tiles = -(-spec.topk // _GLUON_TILE)
    part = 4 * spec.layout.d_v * min(spec.heads, _GLUON_TILE)

    def duration(shares: tuple[int, int]) -> float:
        whole, splits = shares
        joining = 1 + (blocks - whole) * splits * part / 4e6 if splits > 1 else 0
        return until_done(blocks, gpu.sms, tiles, whole, splits, start=2) + joining

    def fits(shares: tuple[int, int]) -> bool:
        whole, splits = shares
        return splits == 1 or (splits <= tiles and (blocks - whole) * splits * part <= _PARTIAL_BYTES)

    waves = blocks // gpu.sms
    whole = (0, max(waves - 1, 0) * gpu.sms, waves * gpu.sms)
    return min(filter(fits, itertools.product(whole, _SPLITS)), key=duration)


def _warpgroups(config: Config, gpu: Gpu) -> bool:
    """Whether the products run on whole tiles from shared memory (wgmma, tcgen05), not on warps' registers (mma.sync)."""
    return config["block_h"] >= 64 and 90 <= gpu.capability < 120


def _smem(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory per block, as the compiler reports them, and up to 1 KB more."""
    layout, block_h, block_n = spec.layout, config["block_h"], config["block_n"]
    v4 = isinstance(layout, KvV4Layout)
    q = 2 * block_h * (layout.d_nope + layout.d_rope)
    entry = layout.d_v + 2 * layout.d_rope + layout.scales.width + 12  # a tile in flight, and its slots
    if _warpgroups(config, gpu):
        entry += 2 * layout.d_v + (0 if v4 else 2 * layout.d_rope)  # the dequantised tile, the rope of the running one
    else:
        entry += 4 * layout.d_v if v4 else 2 * block_h
    # The results change their layout through the same memory.
    results = 4 * layout.d_v * block_h if _warpgroups(config, gpu) or block_h == 16 else 0
    return max(q + block_n * entry + 256, results)


def _gluon_smem(spec: AttentionPagedSpec) -> int:
    """Queries and two tiles of bf16 latents, a tile of weights, and less than 2 KB of biases, row values and barriers."""
    return 3 * 2 * _GLUON_TILE * (spec.layout.d_nope + spec.layout.d_rope) + 2 * _GLUON_TILE**2 + 2048


def _cache(layout: KvLayout, blocks: int, draw: Draw) -> Tensor:
    """Random latents of different magnitudes, quantised into every slot."""
    cache = layout.empty(blocks, draw.device)
    for first in range(0, blocks * layout.page if draw.device != "meta" else 0, _FILL):
        count = min(_FILL, blocks * layout.page - first)
        nope = draw.normal(count, layout.d_nope) * draw.uniform(count, 1, low=0.05, high=0.5)
        values, scales = quantize_groups(nope, layout.group, isinstance(layout, KvV4Layout))
        slots = torch.arange(first, first + count, device=cache.device)
        layout.pack(cache, slots, values, scales, draw.normal(count, layout.d_rope, scale=0.3))
    return cache


def _indices(draw: Draw, rows: int, slots: int, topk: int) -> Tensor:
    """int32 [rows, topk]: random slots, no slot twice in a row of the tensor; -1 where the cache holds too few."""
    chosen = torch.full((rows, topk), -1, dtype=torch.int32, device=draw.device)
    for row in range(rows if slots else 0):
        order = draw.permutation(slots)[:topk]
        chosen[row, : len(order)] = order.int()
    return chosen


def _spoiled(draw: Draw, indices: Tensor, slots: int) -> Tensor:
    """Every eighth entry invalid at random places, the first row without a token."""
    invalid = torch.tensor([-1, slots, 2**31 - 1, -(2**31)], dtype=torch.int32, device=draw.device)
    replaced = draw.uniform(*indices.shape) < 1 / 8
    spoiled = torch.where(replaced, invalid[draw.integers(0, 4, *indices.shape, dtype=torch.int64)], indices)
    spoiled[:1] = slots
    return spoiled


def _listed(spec: AttentionPagedSpec, inputs: Inputs, row: int, query: int) -> Tensor:
    """fp32 latents [valid entries, d_qk] of one query, rounded to bf16 as reading the cache back rounds them."""
    slots, lengths = inputs["indices"][row, query], inputs["lengths"]
    if lengths is not None:
        slots = slots[: max(0, int(lengths[row, query] if lengths.dim() == 2 else lengths[row]))]
    slots = slots[valid_slots(slots, tokens_of(spec.layout, inputs["cache"]))]
    return spec.layout.dequantize(inputs["cache"], slots).bfloat16().float()


OP = AttentionPaged()
