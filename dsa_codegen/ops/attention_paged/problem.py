"""Sparse MLA, decode: the newest queries of each sequence attend to listed slots of a paged latent KV cache, FP8 or BF16.

``s[h,i] = sm_scale · q[h] · kv[indices[i]]``, ``out[h] = Σ_i softmax(s[h])[i] · kv[indices[i], :d_v]``,
``lse[h] = ln Σ_i exp(s[h,i])`` (DeepSeek-V3.2-Exp report, section 2: MLA in its MQA mode), where ``kv`` is the latent that a
slot states, rounded to bf16: the results are those of prefill attention on the BF16 latents read back from the cache. With a
sink, ``exp(sink[h])`` joins the softmax's denominator; lse stays as it is. A slot below 0 or past the cache means "no token".

A second pool may be listed beside the first: another cache of the same layout with a page, lists and lengths of its own. One
softmax runs over both (DeepSeek-V4: a window of recent tokens beside the chosen compressed ones).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError, SpecError
from ...problem import channels, checks
from ...problem.caches import tokens_of, valid_slots
from ...problem.draw import Draw
from ...problem.kv_layouts import KV_LAYOUTS, AnyKvLayout, KvPlainLayout, kv_layout, require_kv_channels
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.paged import FIXED, check_cache, check_plain_rows, scales_of
from ...problem.paged import check_scale as check_cache_scale
from ...problem.presets import NO_CACHE, Model
from ...problem.quantization import quantize_groups
from ...problem.values import Bucket, Sizes, Spec, typical
from ..attended import attended, check_buffers, check_scale, compare_attended

_SHARED = 0.02  # scale of a cache whose values share one
_BY_CHANNELS = {576: "v32", 512: "v4"}
_PROMPTS = (512, 2048, 8192)  # rows of calls that are no decode step
_FEW = 17  # sequences: of fewer it matters how many rows each has
_CLUSTERS = 34  # sequences from which on a cluster of two SMs has one of them, of 33 each two
_IN_PAIRS = (57, 65)  # sequences of which each may have two of the 132 SMs of a Hopper GPU, and few are left
_ONE_WAVE = (113, 133)  # sequences whose rows, of so many queries each, fill so many whole waves of the 132 SMs of a Hopper GPU
_MANY = (65, 97, 129, 161, 257, 321, *_PROMPTS)  # rows, in whatever sequences, that may be a prompt's where there are few slots
_SLOTS_OF_A_ROW = 512  # of few
_FILL = 1 << 16  # tokens of a cache that are drawn and packed at a time


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
    extra_topk: int = 0
    """Entries of a row in the second pool; 0 where there is none."""
    extra_page: int = 64
    extra_lengths: bool = False
    """Whether only the first ``extra_lengths`` of them count."""
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""
    d_v: int = channels.D_V
    """Channels of a token, the first ones, that are its value."""
    d_rope: int = 64
    """Channels that stay bf16 in an FP8 cache; of "bf16" those that are key only."""
    rope_in_value: bool = False
    """Whether these are the last ones of the value; no matter for "v32" and "v4"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        self.require_range("topk", 1, 1 << 20)
        self.require_in("kv_layout", KV_LAYOUTS)
        self.require_range("page", 1, 1024)
        self.require_range("extra_topk", 0, 1 << 20)
        self.require_range("extra_page", 1, 1024)
        self.require_in("extra_lengths", (False, True) if self.extra_topk else (False,))
        self._require_channels()

    def _require_channels(self) -> None:
        fixed = self.kv_layout in FIXED
        self.require_range("d_v", channels.D_V if fixed else channels.LEAST, channels.MOST, channels.STEP)
        self.require_range("d_rope", 64 if fixed else 0, 64 if fixed else channels.MOST_TAIL, channels.STEP)
        self.require_in("rope_in_value", (False,) if fixed or self.kv_layout == "bf16" or not self.d_rope else (False, True))
        if not fixed:
            try:
                require_kv_channels(self.kv_layout, self._d_nope, self.d_rope)
            except SpecError as error:  # of a field that a model has and this spec has not
                raise SpecError(f"{type(self).__name__}.d_v", self.d_v, _of_which(error)) from None

    @property
    def _d_nope(self) -> int:
        return self.d_v - self.d_rope if self.rope_in_value else self.d_v

    @property
    def d_qk(self) -> int:
        """Channels of queries and tokens."""
        return self.layout.d_nope + self.layout.d_rope

    @property
    def general(self) -> bool:
        """Whether templates take channels and scales as they come, value and rotary part in tiles of their own."""
        return self.kv_layout not in FIXED

    @property
    def layout(self) -> AnyKvLayout:
        """How a block of the cache is laid out."""
        return kv_layout(self.kv_layout, self.page, self._d_nope, self.d_rope, self.d_v)

    @property
    def extra_layout(self) -> AnyKvLayout:
        """How a block of the second pool is laid out."""
        return kv_layout(self.kv_layout, self.extra_page, self._d_nope, self.d_rope, self.d_v)


@dataclass(frozen=True)
class AttentionPagedSizes(Sizes):
    """What varies from call to call."""

    batch: int
    next_n: int
    tokens: int
    """Slots of the cache, or of both."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "batch": (2, 3, 4, 5, 7, 9, _FEW, _CLUSTERS, *_IN_PAIRS, *_ONE_WAVE, *_PROMPTS),
        "next_n": (2, 3, 5, 9, *_PROMPTS),
        "tokens": (16385, 40961, 65537, (1 << 17) + 1, (1 << 20) + 1),
    }

    def bucket(self) -> Bucket:
        """A decode step's by its batch, of few sequences or of as many as have two SMs each by the rows of each too; a
        prompt's, as sequences of one row or as rows of few sequences, by its slots too. So are others that have few slots a
        row, by their rows: no record of a decode step holds such a bucket.
        """
        batch, next_n, tokens = super().bucket()
        if self.batch >= _PROMPTS[0]:
            return batch, tokens
        if self.next_n >= _PROMPTS[0]:
            return ("batch", 0, _PROMPTS[0]), next_n, tokens
        least = max((edge for edge in _MANY if edge <= self.batch * self.next_n), default=0)
        if tokens[2] is not None and tokens[2] - 1 <= _SLOTS_OF_A_ROW * least:
            return ("batch", 0, _PROMPTS[0]), ("rows", least, next((edge for edge in _MANY if edge > least), None)), tokens
        return (batch, next_n) if self.batch < _FEW or batch[1:] == _IN_PAIRS else (batch,)

    def typical(self, other: AttentionPagedSizes) -> AttentionPagedSizes:
        """A decode step has more slots than any prompt's rows; rows are those of as many sequences as are no prompt."""
        bucket, found = self.bucket(), super().typical(other)
        if not any(name == "tokens" for name, _, _ in bucket):  # a decode step's
            return replace(found, tokens=self.EDGES["tokens"][-1])
        rows = next((typical(low, high) for name, low, high in bucket if name == "rows"), None)
        if rows is None:
            return found
        next_n = -(-rows // (_PROMPTS[0] - 1))
        return replace(found, batch=rows // next_n, next_n=next_n)


class AttentionPagedProblem(Problem[AttentionPagedSpec, AttentionPagedSizes]):
    """See the module's first lines."""

    name = "attention_paged"
    summary = "Sparse MLA decode: the newest queries attend to listed slots of a paged latent KV cache."
    function = "sparse_attention_paged"
    schema = (
        "(Tensor q, Tensor cache, Tensor indices, float sm_scale, Tensor? lengths=None, Tensor? sink=None, "
        "Tensor? extra_cache=None, Tensor? extra_indices=None, Tensor? extra_lengths=None, "
        "bool batch_invariant=False, str layout='', int d_v=512, int d_rope=-1, float scale=1.0) -> (Tensor, Tensor)"
    )
    buffers = ("out", "lse")
    spec_type = AttentionPagedSpec
    sizes_type = AttentionPagedSizes
    minor = frozenset({"lengths", "sink", "page", "extra_page", "extra_lengths", "batch_invariant"})

    def specs_of(self, model: Model) -> Sequence[AttentionPagedSpec]:
        if model.kv_layout == NO_CACHE:
            return ()
        of: dict[str, Any] = {"sink": model.attn_sink, "batch_invariant": model.invariant}
        of |= {"d_v": model.d_v, "d_rope": model.d_rope}
        if model.kv_layout == "bf16":
            of["d_rope"] = model.d_qk - model.d_v
        elif model.kv_layout not in FIXED:
            of["rope_in_value"] = model.rope_in_value
        of["lengths"] = model.pool > 1  # lists of blocks and of the tokens behind the last one end where they say
        return (AttentionPagedSpec(model.heads, model.entries, model.kv_layout, model.page, **of),)

    def bind(self, *args: Any) -> tuple[AttentionPagedSpec, AttentionPagedSizes, Inputs]:
        q, cache, indices, sm_scale, lengths, sink, extra_cache, extra_indices, extra_lengths, *rest = args
        invariant, layout, d_v, d_rope, scale, *brought = rest
        q = checks.rows("q", q, (None, None, None, None), torch.bfloat16)
        batch, next_n, heads, d_qk = q.shape
        known, of = _layout_of(d_qk, layout, d_v, d_rope)
        page, topk = _check_pool("", known, q, cache, indices, lengths)
        if sink is not None:
            sink = checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        check_scale(sm_scale)
        extra = _bind_extra(known, q, extra_cache, extra_indices, extra_lengths)
        given = page, lengths is not None, sink is not None
        spec = AttentionPagedSpec(heads, topk, known.name, *given, *extra, batch_invariant=invariant, **of)
        inputs = {"q": q, "cache": cache, "indices": indices, "sm_scale": sm_scale, "lengths": lengths, "sink": sink}
        inputs |= {"extra_cache": extra_cache, "extra_indices": extra_indices, "extra_lengths": extra_lengths}
        inputs |= check_cache_scale(known, scale)
        buffers = check_buffers(self.buffers, brought, (batch, next_n, heads), known.d_v, q)
        slots = cache.shape[0] * page + (extra_cache.shape[0] * spec.extra_page if spec.extra_topk else 0)
        return spec, AttentionPagedSizes(batch, next_n, slots), {**inputs, **buffers}

    def inputs(self, spec: AttentionPagedSpec, case: Case[AttentionPagedSizes], draw: Draw) -> Inputs:
        batch, next_n = case.sizes.batch, case.sizes.next_n
        layout = spec.layout
        pool = _draw_pool(layout, spec.topk, spec.lengths, case, draw)
        inputs = {
            "q": draw.normal(batch, next_n, spec.heads, layout.d_nope + layout.d_rope, dtype=torch.bfloat16),
            "cache": pool["cache"],
            "indices": pool["indices"],
            "sm_scale": (layout.d_nope + layout.d_rope) ** -0.5,
            "lengths": pool["lengths"],
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }
        if scales_of(layout) == "tensor":
            inputs["scale"] = _SHARED
        extra = dict.fromkeys(("cache", "indices", "lengths"))
        if spec.extra_topk:
            extra |= _draw_pool(spec.extra_layout, spec.extra_topk, spec.extra_lengths, case, draw)
        return inputs | {f"extra_{name}": value for name, value in extra.items()}

    def reference(self, spec: AttentionPagedSpec, inputs: Inputs) -> Outputs:
        return self._attend(spec, inputs, lambda value: value)

    def _attend(self, spec: AttentionPagedSpec, inputs: Inputs, of: Callable[[Tensor], Tensor]) -> Outputs:
        """Attention to what ``of`` makes of the values."""
        outputs = self.allocate(spec, inputs)
        out = torch.zeros_like(outputs["out"], dtype=torch.float32)
        lse = torch.full_like(outputs["lse"], -math.inf)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:2])).tolist():
            latent = _listed(spec, inputs, *at)
            scores = inputs["q"][tuple(at)].float() @ latent.T * inputs["sm_scale"]
            lse[tuple(at)] = total = scores.logsumexp(-1)
            if inputs["sink"] is not None:
                total = torch.logaddexp(total, inputs["sink"])
            out[tuple(at)] = (scores - total[:, None]).exp() @ of(latent[:, : spec.layout.d_v])
        return {"out": out, "lse": lse}

    def allocate(self, spec: AttentionPagedSpec, inputs: Inputs) -> Outputs:
        return attended(inputs, inputs["q"].shape[:3], spec.layout.d_v)

    def check(self, spec: AttentionPagedSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare_attended(outputs, reference, magnitude=lambda: self._attend(spec, inputs, torch.abs)["out"])

    def cost(self, spec: AttentionPagedSpec, case: Case[AttentionPagedSizes]) -> Cost:
        layout, rows = spec.layout, case.sizes.batch * case.sizes.next_n
        d_qk, entries = layout.d_nope + layout.d_rope, spec.topk + spec.extra_topk
        chosen = min(spec.topk, case.sizes.tokens) + min(spec.extra_topk, case.sizes.tokens)
        flops = 2 * rows * spec.heads * chosen * (d_qk + layout.d_v)
        pools = 2 if spec.extra_topk else 1
        gathered = min(pools * case.sizes.tokens, rows * chosen) * layout.bytes_per_token
        return Cost(flops, gathered + 4 * rows * entries + rows * spec.heads * (2 * d_qk + 2 * layout.d_v + 4), "bf16")

    def cases(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        sizes = ((2, 2, 333), (1, 1, 40), (3, 1, 0), (0, 1, 64))
        return [Case(AttentionPagedSizes(1, 2, 300), "random"), *(Case(AttentionPagedSizes(*size), "ragged") for size in sizes)]

    def long_cases(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        return [Case(AttentionPagedSizes(130, 2, 3000), "ragged")]  # blocks of two rounds, and lists that may be sorted

    def options(self, spec: AttentionPagedSpec) -> Sequence[AttentionPagedSpec]:
        plain = [replace(spec, lengths=lengths, sink=sink) for lengths in (False, True) for sink in (False, True)]
        extra = replace(spec, topk=128, extra_topk=spec.topk, extra_page=spec.page, page=256)
        return (*plain, extra, replace(extra, lengths=True, sink=True, extra_page=2, extra_lengths=True))

    def workloads(self, spec: AttentionPagedSpec) -> Sequence[Case[AttentionPagedSizes]]:
        # Far more tokens than fit in L2 where a batch would bring them.
        few, many = (1, 1 << 16), (4096, 1 << 15)
        batches = ((64, 1 << 20), few, (8, 1 << 18), (128, 1 << 20), many, *((batch, 1 << 20) for batch in (32, 48, 96, 256)))
        return [Case(AttentionPagedSizes(batch, 1, tokens), "random") for batch, tokens in batches]


def _layout_of(d_qk: int, name: str, d_v: int, d_rope: int) -> tuple[AnyKvLayout, dict[str, Any]]:
    """(the layout, of any page; the spec's fields that say so) of queries with d_qk channels; by these where it has no name."""
    checks.one_of("layout", name, ("", *KV_LAYOUTS))
    d_qk = int(d_qk)  # a trace with sizes of any value settles for this one
    name = name or _BY_CHANNELS.get(d_qk, "")
    if name in ("", *FIXED):
        if _BY_CHANNELS.get(d_qk) != name or not name:
            raise InputError("q", f"{d_qk} channels", "576 for the 656-byte cache, 512 for the 584-byte one")
        if d_v != channels.D_V or d_rope not in (-1, 64):
            raise InputError(
                "d_v", f"{d_v}, d_rope {d_rope}", "512, and 64 bf16 channels, in caches that are not named otherwise"
            )
        return kv_layout(name), {}
    channels.check("q", d_qk, d_v)
    tail = d_qk - d_v
    allowed = [tail] if tail or name == "bf16" else list(range(0, channels.MOST_TAIL + 1, channels.STEP))
    if d_rope not in (-1, *allowed):
        raise InputError("d_rope", d_rope, f"{' or '.join(map(str, allowed))}, where q has {d_qk} channels and d_v is {d_v}")
    rope = tail if d_rope == -1 else d_rope
    inside = rope > 0 and not tail
    try:
        require_kv_channels(name, d_v - rope if inside else d_v, rope)
    except SpecError as error:
        raise InputError("d_v", d_v, _of_which(error)) from None
    layout = kv_layout(name, 1, d_v - rope if inside else d_v, rope, d_v)
    return layout, {"d_v": d_v, "d_rope": rope, "rope_in_value": inside}


def _of_which(error: SpecError) -> str:
    """What is allowed of the channels that a layout names."""
    return f"{error.allowed}, of channels {'with' if error.field == 'd_rope' else 'without'} position"


def _check_pool(
    prefix: str, layout: AnyKvLayout, q: Tensor, cache: object, indices: object, lengths: object
) -> tuple[int, int]:
    """Check a pool's arguments, whose names begin with the prefix, and return its page and the entries of a row."""
    batch, next_n = q.shape[:2]
    if isinstance(layout, KvPlainLayout):
        page = check_plain_rows(f"{prefix}cache", cache, layout.width, torch.bfloat16, q)
    else:
        page = check_cache(f"{prefix}cache", cache, layout.bytes_per_token, like=q)
    topk = checks.rows(f"{prefix}indices", indices, (batch, next_n, None), torch.int32, like=q, whole=False).shape[2]
    if lengths is not None:
        per_query = isinstance(lengths, Tensor) and lengths.dim() == 2
        checks.tensor(f"{prefix}lengths", lengths, (batch, next_n) if per_query else (batch,), torch.int32, like=q)
    return page, topk


def _bind_extra(layout: AnyKvLayout, q: Tensor, cache: object, indices: object, lengths: object) -> tuple[int, int, bool]:
    """The spec's fields of the second pool: entries of a row, page, whether there are lengths."""
    if cache is None:
        for name, value in (("extra_indices", indices), ("extra_lengths", lengths)):
            if value is not None:
                raise InputError(name, "a tensor", "None without extra_cache")
        return 0, 64, False
    page, topk = _check_pool("extra_", layout, q, cache, indices, lengths)
    return (topk, page, lengths is not None) if topk else (0, 64, False)


def _draw_pool(layout: AnyKvLayout, topk: int, lengths: bool, case: Case[AttentionPagedSizes], draw: Draw) -> Inputs:
    """cache, indices and lengths of one pool."""
    batch, next_n = case.sizes.batch, case.sizes.next_n
    blocks = -(-case.sizes.tokens // layout.page)
    indices = _indices(draw, batch * next_n, blocks * layout.page, topk)
    if case.distribution == "ragged":
        indices = _spoiled(draw, indices, blocks * layout.page)
    rows = (batch, next_n) if batch % 2 == 0 else (batch,)
    return {
        "lengths": draw.integers(-1, topk + 3, *rows) if lengths else None,
        "indices": indices.view(batch, next_n, topk),
        "cache": _cache(layout, blocks, draw),
    }


def _cache(layout: AnyKvLayout, blocks: int, draw: Draw) -> Tensor:
    """Random latents of different magnitudes, quantised into every slot."""
    cache = layout.empty(blocks, draw.device)
    for first in range(0, blocks * layout.page if draw.device != "meta" else 0, _FILL):
        count = min(_FILL, blocks * layout.page - first)
        nope = draw.normal(count, layout.d_nope) * draw.uniform(count, 1, low=0.05, high=0.5)
        slots = torch.arange(first, first + count, device=cache.device)
        if isinstance(layout, KvPlainLayout):
            layout.store(cache, slots, torch.cat((nope, draw.normal(count, layout.d_rope, scale=0.3)), 1).bfloat16())
            continue
        shared = _SHARED if scales_of(layout) == "tensor" else None
        values, scales = quantize_groups(nope, layout.group, scales_of(layout) == "e8m0", shared)
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
    """fp32 latents [valid entries of all pools, d_qk] of one query, rounded to bf16 as reading the cache back rounds them."""
    pools = [("", spec.layout), *([("extra_", spec.extra_layout)] if spec.extra_topk else [])]
    latents = []
    for prefix, layout in pools:
        cache, slots, lengths = (inputs[f"{prefix}{name}"] for name in ("cache", "indices", "lengths"))
        slots = slots[row, query]
        if lengths is not None:
            slots = slots[: max(0, int(lengths[row, query] if lengths.dim() == 2 else lengths[row]))]
        slots = slots[valid_slots(slots, tokens_of(layout, cache))]
        latents.append(layout.dequantize(cache, slots, inputs.get("scale", 1.0)).bfloat16().float())
    return torch.cat(latents)
