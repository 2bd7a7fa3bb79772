"""Sparse grouped-query attention: the heads of a KV head attend to that head's own list of tokens, or of blocks of tokens.

``s[h,t] = sm_scale · q[h] · k[t, h // group]``, ``out[h] = Σ_t softmax(s[h])[t] · v[t, h // group]`` over the tokens t of the
list of (row, KV head), ``lse[h] = ln Σ_t exp(s[h,t])`` (MiniMax-M3 and Qwen4-Exp, as transformers states them). An entry b of a
list stands for tokens b · block to (b + 1) · block, as far as they lie before the row's end; an entry below 0 or beyond stands
for none, and one that is listed twice counts twice. With a sink, ``exp(sink[h])`` joins the softmax's denominator; lse stays as
it is. Keys and values lie in rows, or in pages of a cache that a table names for each request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import BLOCKS, GQA, NO_CACHE, Model
from ...problem.values import Sizes, Spec
from ..attended import attended, check_buffers, check_scale, compare_attended
from ..logits import exact

SHARES = (1, 2, 4)
"""Of how many neighbouring rows lists may be joined."""
LONGEST_SHARED = 128
"""Entries of a list that may be joined with others; a longer one is gathered by itself."""
_CHANNELS = range(16, 257, 16)
_LONGEST = 1 << 30  # tokens; kernels step a block beyond
_GATHERED = 1 << 26  # channels of keys that the reference gathers at a time


@dataclass(frozen=True)
class AttentionGqaSpec(Spec):
    """What changes the code."""

    heads: int
    kv_heads: int
    d_qk: int
    """Channels of a query and of a key."""
    d_v: int
    """Channels of a value."""
    topk: int
    """Entries of a list."""
    block: int = 1
    """Tokens that an entry stands for."""
    page: int = 0
    """Tokens per page of the caches; 0 where keys and values lie in rows."""
    ends: bool = False
    """Whether only the tokens before ``ends[row]`` count."""
    lengths: bool = False
    """Whether only the first ``lengths[row, kv_head]`` entries of a list count."""
    sink: bool = False
    share: int = 1
    """So many neighbouring rows gather the union of their lists together; results are the same."""
    batch_invariant: bool = False
    """Whether a row's bits may depend on nothing beside it: one order of summation, whatever the sizes and the records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("heads", 1, 128)
        self.require_in("kv_heads", (count for count in range(1, self.heads + 1) if self.heads % count == 0))
        self.require_in("d_qk", _CHANNELS)
        self.require_in("d_v", _CHANNELS)
        self.require_range("topk", 1, 1 << 20)
        self.require_in("block", BLOCKS)
        self.require_range("page", 0, 1024)
        self.require_in("share", SHARES)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class AttentionGqaSizes(Sizes):
    """What varies from call to call."""

    rows: int
    tokens: int
    """That a row may list: all of them, or those of its request's pages."""
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (2, 17, 65, 1025)}


class AttentionGqaProblem(Problem[AttentionGqaSpec, AttentionGqaSizes]):
    """See the module's first lines."""

    name = "attention_gqa"
    summary = "Sparse grouped-query attention: the heads of a KV head attend to its own list of tokens or of blocks of tokens."
    function = "sparse_attention_gqa"
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor indices, float sm_scale, int block=1, Tensor? ends=None, "
        "Tensor? page_table=None, Tensor? lengths=None, Tensor? sink=None, int share=1, "
        "bool batch_invariant=False) -> (Tensor, Tensor)"
    )
    buffers = ("out", "lse")
    spec_type = AttentionGqaSpec
    sizes_type = AttentionGqaSizes
    minor = frozenset({"page", "ends", "lengths", "sink", "batch_invariant"})
    attentions = (GQA,)

    def specs_of(self, model: Model) -> Sequence[AttentionGqaSpec]:
        shape = model.heads, model.kv_heads, model.d_qk, model.d_v, model.topk // model.block, model.block
        rows = AttentionGqaSpec(*shape, ends=True, sink=model.attn_sink, batch_invariant=model.invariant)
        return (rows,) if model.kv_layout == NO_CACHE else (rows, replace(rows, page=model.page))

    def bind(self, *args: Any) -> tuple[AttentionGqaSpec, AttentionGqaSizes, Inputs]:
        q, k, v, indices, sm_scale, block, ends, page_table, lengths, sink, share, invariant, *brought = args
        q = checks.rows("q", q, (None, None, None), checks.floating(q))
        rows, heads, d_qk = q.shape
        places = (None,) if page_table is None else (None, None)
        k = checks.rows("k", k, (*places, None, d_qk), q.dtype, like=q)
        kv_heads = k.shape[-2]
        if not kv_heads or heads % kv_heads:
            raise InputError("k", f"{kv_heads} heads", f"a divisor of the {heads} heads of q")
        v = checks.rows("v", v, (*k.shape[:-1], None), q.dtype, like=q)
        indices = checks.rows("indices", indices, (rows, kv_heads, None), torch.int32, like=q, whole=False)
        if ends is not None:
            ends = checks.tensor("ends", ends, (rows,), torch.int32, like=q)
        if lengths is not None:
            lengths = checks.tensor("lengths", lengths, (rows, kv_heads), torch.int32, like=q)
        if sink is not None:
            sink = checks.tensor("sink", sink, (heads,), torch.float32, like=q)
        check_scale(sm_scale)
        checks.one_of("block", block, BLOCKS)
        checks.one_of("share", share, SHARES)
        page, tokens = (0, k.shape[0]) if page_table is None else _paged(page_table, k, rows)
        if tokens > _LONGEST:
            raise InputError("k" if page_table is None else "page_table", f"{tokens} tokens", f"at most {_LONGEST}")
        buffers = check_buffers(self.buffers, brought, (rows, heads), v.shape[-1], q)
        options = ends is not None, lengths is not None, sink is not None
        topk = indices.shape[2]
        share = 1 if invariant else share  # a union of lists would be added up in an order that the neighbours decide
        joined = sharing(share, heads // kv_heads, topk, 0 if page_table is None else rows // max(page_table.shape[0], 1))
        spec = AttentionGqaSpec(heads, kv_heads, d_qk, v.shape[-1], topk, block, page, *options, joined, invariant)
        inputs = {"q": q, "k": k, "v": v, "indices": indices, "sm_scale": sm_scale, "ends": ends}
        inputs |= {"page_table": page_table, "lengths": lengths, "sink": sink, **buffers}
        return spec, AttentionGqaSizes(rows, tokens), inputs

    def inputs(self, spec: AttentionGqaSpec, case: Case[AttentionGqaSizes], draw: Draw) -> Inputs:
        rows, tokens = case.sizes.rows, case.sizes.tokens
        ragged = case.distribution == "ragged"
        indices = _lists(spec, rows, tokens, draw)
        if ragged:
            indices = _spoiled(draw, indices, -(-tokens // spec.block))
        places, table = ((tokens,), None) if not spec.page else _pages(spec, case, draw)
        # Scores of deviation 1, values of 0.1: as the other attentions have them.
        return {
            "q": draw.normal(rows, spec.heads, spec.d_qk, dtype=torch.bfloat16, scale=10.0),
            "k": draw.normal(*places, spec.kv_heads, spec.d_qk, dtype=torch.bfloat16, scale=0.1),
            "v": draw.normal(*places, spec.kv_heads, spec.d_v, dtype=torch.bfloat16, scale=0.1),
            "indices": indices,
            "sm_scale": spec.d_qk**-0.5,
            "block": spec.block,
            "ends": draw.integers(-1 if ragged else tokens, tokens + 3, rows) if spec.ends else None,
            "page_table": table,
            "lengths": draw.integers(-1, spec.topk + 3, rows, spec.kv_heads) if spec.lengths else None,
            "sink": draw.normal(spec.heads, scale=2.0) if spec.sink else None,
        }

    def reference(self, spec: AttentionGqaSpec, inputs: Inputs) -> Outputs:
        # Products of one shape add up in one order.
        step = 1 if spec.batch_invariant else max(1, _GATHERED // (spec.kv_heads * spec.topk * spec.block * spec.d_qk or 1))
        firsts = range(0, max(len(inputs["q"]), 1), step)
        parts = [_attend(spec, inputs, slice(first, first + step)) for first in firsts]
        return {name: torch.cat([part[name] for part in parts]) for name in self.buffers}

    def allocate(self, spec: AttentionGqaSpec, inputs: Inputs) -> Outputs:
        return attended(inputs, inputs["q"].shape[:2], spec.d_v)

    def check(self, spec: AttentionGqaSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare_attended(outputs, reference)

    def cost(self, spec: AttentionGqaSpec, case: Case[AttentionGqaSizes]) -> Cost:
        rows, tokens = case.sizes.rows, case.sizes.tokens
        chosen, channels = min(spec.topk * spec.block, tokens), spec.d_qk + spec.d_v
        there = tokens * (rows if spec.page else 1)  # every row of decode has pages of its own
        read = 2 * spec.kv_heads * channels * min(there, rows * chosen)
        lists, results = 4 * rows * spec.kv_heads * spec.topk, rows * spec.heads * (2 * channels + 4)
        return Cost(2 * rows * spec.heads * chosen * channels, read + lists + results, "bf16")

    def cases(self, spec: AttentionGqaSpec) -> Sequence[Case[AttentionGqaSizes]]:
        sizes = ((1, 1), (spec.share + 1, 333), (2, 1000), (3, 0), (0, 40))
        ragged = [Case(AttentionGqaSizes(rows, tokens), "ragged") for rows, tokens in sizes]
        return [Case(AttentionGqaSizes(2, 700), "random"), *ragged]

    def long_cases(self, spec: AttentionGqaSpec) -> Sequence[Case[AttentionGqaSizes]]:
        return [Case(AttentionGqaSizes(150, 2500), "ragged"), Case(AttentionGqaSizes(75, 9000), "random")]

    def options(self, spec: AttentionGqaSpec) -> Sequence[AttentionGqaSpec]:
        bare = replace(spec, ends=False, lengths=False, sink=False)
        full = replace(spec, ends=True, lengths=True, sink=True)
        tokens = replace(full, block=1, topk=spec.topk * spec.block)
        share = 1 if spec.batch_invariant else sharing(SHARES[-1], spec.group, spec.topk, 0)
        return tuple(dict.fromkeys((spec, bare, full, tokens, replace(full, share=share))))

    def workloads(self, spec: AttentionGqaSpec) -> Sequence[Case[AttentionGqaSizes]]:
        sizes = ((64, 32768), (1, 65536), (8, 65536), (128, 32768)) if spec.page else ((4096, 32768), (512, 32768))
        return [Case(AttentionGqaSizes(*size), "random") for size in sizes]


def sharing(share: int, group: int, topk: int, rows_per_request: int) -> int:
    """How many of ``share`` neighbouring rows gather together: 64 heads in all, short lists, rows of one request.

    Args:
        rows_per_request: 0 where all rows read the same keys.
    """
    return max(joined for joined in SHARES if joined == 1 or _may_join(joined, share, group, topk, rows_per_request))


def _may_join(joined: int, share: int, group: int, topk: int, rows_per_request: int) -> bool:
    return joined <= share and joined * group <= 64 and topk <= LONGEST_SHARED and rows_per_request % joined == 0


def _paged(page_table: object, k: Tensor, rows: int) -> tuple[int, int]:
    """(tokens of a page, tokens of a request) of a table [requests, max_pages] over caches [blocks, page, kv_heads, d]."""
    table = checks.tensor("page_table", page_table, (None, None), torch.int32, like=k, inner_contiguous=True)
    requests, page = table.shape[0], k.shape[1]
    if rows % max(requests, 1) or (rows and not requests):
        raise InputError("page_table", f"{requests} rows", f"a row per request, and the {rows} rows of q shared")
    if not 1 <= page <= 1024:
        raise InputError("k", f"pages of {page} tokens", "1 to 1024")
    return page, table.shape[1] * page


def _lists(spec: AttentionGqaSpec, rows: int, tokens: int, draw: Draw) -> Tensor:
    """int32 [rows, kv_heads, topk]: distinct random entries in ascending order, -1 behind them where there are too few.

    Of rows that share, neighbours have about four fifths of their entries in common.
    """
    blocks = -(-tokens // spec.block)
    chosen = torch.full((rows, spec.kv_heads, spec.topk), -1, dtype=torch.int32, device=draw.device)
    kept, step = min(spec.topk, blocks), max(1, (1 << 24) // max(spec.kv_heads * blocks, 1))
    for first in range(0, rows if kept else 0, step):
        shape = min(step, rows - first), spec.kv_heads, blocks
        ranks = draw.uniform(*shape)
        if spec.share > 1:
            ranks = torch.where(draw.uniform(*shape) < 1 / 10, ranks, draw.uniform(1, *shape[1:]))
        chosen[first : first + step, :, :kept] = ranks.topk(kept).indices.sort().values.int()
    return chosen


def _spoiled(draw: Draw, indices: Tensor, blocks: int) -> Tensor:
    """Every eighth entry invalid at random places, and some twice; the first row empty, the second at its beginning."""
    worst = torch.tensor([-1, blocks, 2**31 - 1, -(2**31)], dtype=torch.int32, device=draw.device)
    chance = draw.uniform(*indices.shape)
    spoiled = torch.where(chance < 1 / 8, worst[draw.integers(0, 4, *indices.shape)], indices)
    spoiled = torch.where(chance > 15 / 16, indices.roll(1, -1), spoiled)
    spoiled[:1] = -1
    spoiled[1:2, :, : indices.shape[-1] // 2] = blocks
    return spoiled


def _pages(spec: AttentionGqaSpec, case: Case[AttentionGqaSizes], draw: Draw) -> tuple[tuple[int, ...], Tensor]:
    """(shape of a cache, int32 [requests, max_pages]); ragged: two rows share a request, and some pages are absent."""
    rows = case.sizes.rows
    ragged = case.distribution == "ragged"
    joined = max(spec.share, 2 if ragged else 1)
    others = min(rows, 1) if spec.share > 1 else rows  # rows of one request share, whatever their number
    requests = others if rows % joined else rows // joined
    pages = -(-case.sizes.tokens // spec.page)
    table = draw.permutation(requests * pages + 1)[: requests * pages].view(requests, pages).int()
    if ragged:
        table = table.masked_fill(draw.uniform(requests, pages) < 0.1, -1)
    return (requests * pages + 1, spec.page), table


def _attend(spec: AttentionGqaSpec, inputs: Inputs, rows: slice) -> Outputs:
    """What some rows get, in fp32, or in fp64 where they came so."""
    q = exact(inputs["q"][rows])
    token, valid = _listed(spec, inputs, rows)
    keys, values = (_gathered(inputs, name, token, valid) for name in ("k", "v"))
    grouped = q.unflatten(1, (spec.kv_heads, spec.group))
    scores = torch.einsum("rngd,rntd->rngt", grouped, keys) * inputs["sm_scale"]
    scores = scores.masked_fill(~valid[:, :, None], -math.inf).flatten(1, 2)
    lse = scores.logsumexp(-1)
    total = lse if inputs["sink"] is None else torch.logaddexp(lse, inputs["sink"].expand_as(lse))
    weights = torch.exp(scores - total[..., None]).masked_fill(~valid.repeat_interleave(spec.group, 1), 0.0)
    out = torch.einsum("rngt,rntd->rngd", weights.unflatten(1, (spec.kv_heads, spec.group)), values)
    return {"out": out.flatten(1, 2), "lse": lse}


def _listed(spec: AttentionGqaSpec, inputs: Inputs, rows: slice) -> tuple[Tensor, Tensor]:
    """(places of the listed tokens among all rows of the keys, whether each is one), [rows, kv_heads, topk · block]."""
    listed, device = inputs["indices"][rows].long(), inputs["q"].device
    table = inputs["page_table"]
    tokens = len(inputs["k"]) if table is None else table.shape[1] * spec.page
    if inputs["lengths"] is not None:
        beyond = torch.arange(spec.topk, device=device) >= inputs["lengths"][rows, :, None]
        listed = listed.masked_fill(beyond, -1)
    token = (listed[..., None] * spec.block + torch.arange(spec.block, device=device)).flatten(-2)
    valid = (token >= 0) & (token < tokens)
    if inputs["ends"] is not None:
        valid &= token < inputs["ends"][rows, None, None]
    if table is None or not tokens:
        return token, valid
    shared = len(inputs["q"]) // max(len(table), 1)
    request = torch.arange(len(inputs["q"]), device=device)[rows, None, None] // max(shared, 1)
    token = token.masked_fill(~valid, 0)
    block = table[request, token // spec.page].long()
    return block * spec.page + token % spec.page, valid & (block >= 0) & (block < len(inputs["k"]))


def _gathered(inputs: Inputs, name: str, token: Tensor, valid: Tensor) -> Tensor:
    """[rows, kv_heads, topk · block, channels] of keys or values, 0 where there is no token."""
    source = inputs[name] if inputs["page_table"] is None else inputs[name].flatten(0, 1)
    gathered = source.new_zeros(*token.shape, source.shape[-1])
    head = torch.arange(token.shape[1], device=token.device)[:, None].expand_as(token)
    gathered[valid] = source[token[valid], head[valid]]
    return exact(gathered)
