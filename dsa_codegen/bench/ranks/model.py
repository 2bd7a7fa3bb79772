"""A model of a layer on up to 64 H100s: seconds of arithmetic, measured on one of them, and bytes on the links. Nothing more.

docs/scaling.md explains the terms, and holds what the model said before anything ran on two GPUs; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

WORLDS = (1, 2, 4, 8, 16, 32, 64)
WAYS = {
    "prefill": ("tensor, plain", "tensor", "context, plain", "context"),
    "decode": ("tensor, plain", "tensor", "context", "data"),
}

HEADS, INDEX_HEADS, INDEX_DIM, TOPK, BATCH = 128, 64, 128, 2048, 64
KEY_BYTES, LATENT_BYTES = INDEX_DIM + 4, 2 * 576

# Microseconds on one H100, from docs/performance-h100.md and, for 128 heads, ops/attention/pairs.py.
_FP8_FLOPS = 1.2e9  # of the indexer per µs: 4096 queries of 32K in 1720
_SELECT_ROW, _SELECT_SCORE = 0.014, 1.7e-6  # 4096 rows of 32K in 287, of 128K in 971
_ATTEND_ROW = {
    128: 0.98,
    64: 0.61,
    32: 0.56,
    16: 0.54,
    8: 0.53,
}  # 4096 queries of 32K; fewer take as long
_INDEX_TOKEN, _INDEX_START = 190.9 / (64 * 65536), 2.2  # of the paged cache: batch 64 of 64K in 193
_SELECT_FEW = {64: 18.1, 32: 16.5, 16: 15.5, 8: 14.8, 4: 14.3, 2: 14.0, 1: 13.5}
_ATTEND_FEW = {128: 98.5, 64: 71.8, 32: 61.5, 16: 57.5, 8: 55.8}  # batch 64
_ATTEND_START = 13.5  # batch 1, 128 heads
_AROUND = 9.0  # quantising the queries, and the gaps between launches, of decode
_COPY = 3.0e6  # bytes per µs, read and written

# What a collective takes to begin, and bytes per µs that pass each GPU: inside a node as on two H200s (0.26 MB in 14 µs,
# 84 MB in 450, 759 MB in 3236), between nodes assumed.
_BEGIN, _LINK = 13.0, 0.22e6
_BEGIN_FAR, _LINK_FAR = 40.0, 0.20e6
# By position, seen on two H200s: candidates noted 2.5, put in order 4.8, chosen among 9.2, own ones looked up 3.1, outputs
# packed 6.5 and joined 4.7, lengths 5.1. (By 36 small launches of torch it was 108, and 195 with what lay between.)
_MERGING = 36.0
_DEALT = 2 << 20  # bytes of candidates from which on ranks merge some rows each, as distributed.by_position does


def all_gather_us(total: float, world: int) -> float:
    """Until every rank has all of ``total`` bytes, of which each brought its share."""
    if world == 1:
        return 0.0
    begin, link = (_BEGIN, _LINK) if world <= 8 else (_BEGIN_FAR, _LINK_FAR)
    return begin + total * (world - 1) / world / link


def _of_heads(times: Mapping[int, float], heads: int) -> float:
    return times[max(heads, min(times))]


def _scoring(tokens: int) -> float:
    """Indexer and selection of all rows of a causal sequence."""
    pairs = tokens * (tokens + 1) / 2
    return 2 * pairs * INDEX_HEADS * INDEX_DIM / _FP8_FLOPS + tokens * _SELECT_ROW + pairs * _SELECT_SCORE


def _attending(tokens: int, heads: int) -> float:
    """Rows that see fewer than topk tokens attend to those."""
    full = 1 - min(TOPK, tokens) / 2 / tokens
    return tokens * full * _of_heads(_ATTEND_ROW, heads)


def prefill_us(way: str, tokens: int, world: int) -> float:
    """One layer of a whole sequence."""
    scoring, heads = _scoring(tokens), max(HEADS // world, 1)
    if way == "tensor, plain":
        return scoring + _attending(tokens, heads)
    if way == "tensor":
        return scoring / world + all_gather_us(4 * TOPK * tokens, world) + _attending(tokens, heads)
    keys, latents = (tokens * size for size in (KEY_BYTES, LATENT_BYTES))
    ordering = 2 * (keys + latents) / _COPY if world > 1 else 0.0
    attending = _attending(tokens, HEADS) / world
    if way == "context, plain":  # the last of equally long stretches sees the most keys
        share = (2 * world - 1) / world**2
        return all_gather_us(keys + latents, world) + ordering + share * scoring + attending
    arriving = max(scoring / world, all_gather_us(latents, world) if world > 1 else 0.0)
    return all_gather_us(keys, world) + ordering + arriving + attending


def decode_us(way: str, context: int, world: int) -> float:
    """One layer of a step of ``BATCH`` sequences."""
    heads, share = max(HEADS // world, 1), -(-BATCH // world)
    scoring = _INDEX_START + _INDEX_TOKEN * BATCH * context + _SELECT_FEW[64]
    dealt = _INDEX_START + _INDEX_TOKEN * share * context + _SELECT_FEW[share]
    few = _of_heads(_ATTEND_FEW, heads)
    if way == "tensor, plain":
        return _AROUND + scoring + few
    if way == "tensor":
        return _AROUND + dealt + all_gather_us(4 * TOPK * BATCH, world) + few
    growing = _ATTEND_FEW[128] - _ATTEND_START
    if way == "data":
        return _AROUND + dealt + _ATTEND_START + growing * (share - 1) / (BATCH - 1)
    part = _INDEX_START + _INDEX_TOKEN * BATCH * context / world + _SELECT_FEW[64]
    # Of outputs each rank gets those of its own heads.
    exchanged = _candidates_us(world) + all_gather_us(BATCH * HEADS * (2 * 512 + 4), world)
    merging = _MERGING if world > 1 else 0.0
    return _AROUND + part + exchanged + merging + _ATTEND_START + growing / world


def _candidates_us(world: int) -> float:
    """All of them to every rank, or those of its rows to each, and then choices to every rank."""
    own = 8 * TOPK * BATCH
    if (world - 1) * own < _DEALT:
        return all_gather_us(own * world, world)
    return all_gather_us(own, world) + all_gather_us(4 * TOPK * BATCH, world)


def speedup(stage: str, way: str, context: int, world: int) -> float:
    """Against one GPU."""
    time_us = prefill_us if stage == "prefill" else decode_us
    return time_us(way, context, 1) / time_us(way, context, world)


_STEPS = (
    ("prefill", 32768, "prefill, 32K"),
    ("prefill", 131072, "prefill, 128K"),
    ("prefill", 1 << 20, "prefill, 1M"),
    ("decode", 65536, "decode, 64 × 64K"),
    ("decode", 262144, "decode, 64 × 256K"),
)


def table(worlds: Sequence[int] = WORLDS[1:]) -> str:
    """What the model says, in Markdown: milliseconds on one GPU, and speed-ups."""
    head = ("step", "way", "one GPU, ms", *(f"{world} GPUs" for world in worlds))
    lines = [head, ("---", "---", *["---:"] * (len(worlds) + 1)), *_rows(worlds)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows(worlds: Sequence[int]) -> Iterator[tuple[str, ...]]:
    for stage, context, text in _STEPS:
        for way in WAYS[stage]:
            one = (prefill_us if stage == "prefill" else decode_us)(way, context, 1)
            yield (
                text,
                way,
                f"{one / 1e3:.{3 if one < 1e6 else 4}g}",
                *(f"{speedup(stage, way, context, world):.2f}" for world in worlds),
            )
