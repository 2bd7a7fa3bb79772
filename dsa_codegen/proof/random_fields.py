"""Fields of random specs: of each operation, drawn from all that its spec allows, the common more often than the rest."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ..ops.attention.problem import sharing as neighbours
from ..ops.attention_gqa.problem import SHARES, sharing
from ..problem import channels, paged, presets
from ..problem.kv_layouts import KV_LAYOUTS


def _invariant(draw: random.Random) -> bool:
    """Whether one order of summation is asked for, now and then."""
    return draw.random() < 0.15


def _topk(draw: random.Random, least: int, most: int) -> int:
    """A k of the whole range, mostly one that takes little time."""
    return draw.choice((draw.randint(least, 700), draw.randint(least, 700), draw.randint(least, most)))


def _entries(draw: random.Random) -> int:
    """Entries of attention's lists, now and then as many as models have."""
    return draw.choice((draw.randint(1, 300), draw.randint(1, 300), draw.randint(1, 300), draw.randint(301, 4096)))


def _page(draw: random.Random) -> int:
    """Tokens of a page, mostly such as engines have."""
    return draw.choice((1, 16, 64, draw.randint(1, 200), draw.randint(1, 1024)))


def _listed(draw: random.Random) -> dict[str, Any]:
    """What scores are read as, and what lists name."""
    output = {"output": draw.choice(("tokens", "slots"))}
    return {"scores": draw.choice(("fp32", "bf16")), "starts": draw.random() < 0.5, **output}


def _channels(draw: random.Random, native: bool) -> dict[str, int]:
    """d_qk and d_v of attention."""
    if native and draw.random() < 0.7:
        return {"d_v": 512, "d_qk": draw.choice((512, 576))}
    d_v = draw.choice((64, 128, 192, 256)) if native else draw.randrange(64, 513, 16)
    return {"d_v": d_v, "d_qk": d_v + draw.randrange(0, 129, 16)}


def _heads(draw: random.Random) -> int:
    return draw.choice((4, 8, 16, 32, 64, 128, draw.randint(1, 128)))


def _attended(draw: random.Random, native: bool) -> dict[str, Any]:
    """What forward and backward have in common."""
    flags = {name: draw.random() < 0.5 for name in ("lengths", "sink")}
    heads = 128 if native and draw.random() < 0.3 else _heads(draw)
    return {"heads": heads, "topk": _entries(draw), **_channels(draw, native), **flags}


def _attention(draw: random.Random, native: bool) -> dict[str, Any]:
    found = _attended(draw, native)
    share = neighbours(found["heads"], draw.choice(SHARES))
    more = ({"max_logits": True, "share": share}, {"share": share}, {"math": "fp8"}, {"batch_invariant": True})
    return {**found, **draw.choice(({}, *more))}


def _attention_gqa(draw: random.Random, native: bool) -> dict[str, Any]:
    kv_heads, block = draw.choice((1, 1, 2, 3, 4, 8)), draw.choice(presets.BLOCKS)
    widths = {name: draw.randrange(16, 257, 16) for name in ("d_qk", "d_v")}
    flags = {name: draw.random() < 0.5 for name in ("ends", "lengths", "sink")}
    group, topk = draw.randint(1, 128 // kv_heads), draw.randint(1, max(1, 500 // block))
    invariant = _invariant(draw)
    share = 1 if invariant else sharing(draw.choice(SHARES), group, topk, 0)
    listed = {"topk": topk, "block": block, "page": draw.choice((0, 0, 1, 16, 48, 64, 128, 200)), "share": share}
    return {"heads": kv_heads * group, "kv_heads": kv_heads, **widths, **listed, **flags, "batch_invariant": invariant}


def _attention_paged(draw: random.Random, native: bool) -> dict[str, Any]:
    second = {"extra_topk": draw.randint(1, 90), "extra_page": _page(draw), "extra_lengths": draw.random() < 0.5}
    extra = second if draw.random() < 0.2 else {}
    common = {"heads": _heads(draw), "topk": _entries(draw), "page": _page(draw)}
    common |= {"lengths": draw.random() < 0.5, "sink": draw.random() < 0.5, **({} if native else extra)}
    common["batch_invariant"] = _invariant(draw)
    if native:
        layout = draw.choice((*paged.FIXED, "v41"))
        return {**common, "kv_layout": layout, **({} if layout in paged.FIXED else {"d_rope": 0})}
    layout = draw.choice(KV_LAYOUTS)
    if layout in paged.FIXED:
        return {**common, "kv_layout": layout}
    width = draw.choice([width for width in paged.WIDTHS[layout] if 64 <= width <= 512])
    d_rope = draw.choice(paged.ROPES[layout])
    inside = layout != "bf16" and d_rope > 0 and width + d_rope <= 512 and draw.random() < 0.4
    return {
        **common,
        "kv_layout": layout,
        "d_v": width + d_rope if inside else width,
        "d_rope": d_rope,
        "rope_in_value": inside,
    }


def _indexer(draw: random.Random, native: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"heads": draw.choice((8, 16, 32, 64)), "head_dim": draw.choice((32, 64, 128))}
    if not native:
        found = {"heads": draw.randint(1, 64), "head_dim": draw.choice(channels.INDEX_WIDTHS)}
        found["scores"] = draw.choice(("fp8", "fp8", "bf16"))
    score = draw.choice(("weighted_relu", "relu_bias"))
    flags = {"clean": draw.random() < 0.5, "batch_invariant": _invariant(draw)}
    return {**found, **flags, "score": score, "logits": draw.choice(("fp32", "bf16"))}


def _indexer_prefill(draw: random.Random, native: bool) -> dict[str, Any]:
    return {**_indexer(draw, native), "compressed": draw.random() < 0.3}


def _indexer_paged(draw: random.Random, native: bool) -> dict[str, Any]:
    page = draw.choice((32, 64, 128, 256) if native else (16, 32, 64, 128, 256))
    return {**_indexer(draw, native), "next_n": draw.choice((1, 2, draw.randint(1, 8))), "page": page}


def _rows(draw: random.Random) -> dict[str, Any]:
    layout = draw.choice(paged.LAYOUTS)
    common = {
        "layout": layout,
        "width": draw.choice(paged.WIDTHS[layout]),
        "page": _page(draw),
    }
    return {**common, "slots": draw.choice(("i32", "i64")), "d_rope": draw.choice(paged.ROPES[layout])}


def _gather(draw: random.Random, native: bool) -> dict[str, Any]:
    return _rows(draw)


def _store(draw: random.Random, native: bool) -> dict[str, Any]:
    found = _rows(draw)
    return {**found, "power_of_two": _rounded(draw, found)}


def _rounded(draw: random.Random, found: dict[str, Any]) -> bool:
    scales = paged.scales_of(paged.layout_of(found["layout"], 64, found["width"], found["d_rope"]))
    return scales == "e8m0" or (scales == "fp32" and draw.random() < 0.5)


def _latent(draw: random.Random, native: bool) -> dict[str, Any]:
    found = _rows(draw)
    while found["layout"] == "index_k":
        found = _rows(draw)
    norm = draw.choice(("none", "nope", "latent") if found["d_rope"] else ("none", "nope"))
    styles = {"rotary": draw.choice(("interleaved", "half_split")), "norm": norm, "norm_weight": draw.choice(("fp32", "bf16"))}
    return {**found, **styles, "power_of_two": _rounded(draw, found), "batch_invariant": _invariant(draw)}


def _index_prologue(draw: random.Random, native: bool) -> dict[str, Any]:
    head_dim = draw.choice(channels.INDEX_WIDTHS)
    styles = {"rotary": draw.choice(("interleaved", "half_split")), "rope_first": draw.random() < 0.5}
    found = {"heads": draw.randint(0, 64), "head_dim": head_dim, "d_rope": draw.randrange(0, min(head_dim, 128) + 1, 16)}
    norm = {"norm": draw.choice(("none", "fp32", "bf16")), "hadamard": head_dim in (32, 64, 128, 256) and draw.random() < 0.5}
    placed = {"page": _page(draw), "slots": draw.choice(("i32", "i64"))}
    flags = {"power_of_two": draw.random() < 0.5, "batch_invariant": _invariant(draw)}
    return {**found, **styles, **norm, **placed, **flags, "weights": draw.choice(("fp32", "bf16"))}


def _quantize(draw: random.Random, native: bool) -> dict[str, Any]:
    keys = draw.random() < 0.3
    heads = {} if keys else {"heads": draw.randint(1, 64), "weights": draw.choice(("fp32", "bf16"))}
    width = draw.choice(channels.ROW_WIDTHS if keys else channels.INDEX_WIDTHS)
    return {"width": width, **heads, "power_of_two": draw.random() < 0.5}


def _backward(draw: random.Random, native: bool) -> dict[str, Any]:
    flags = {name: draw.random() < 0.5 for name in ("lse_gradient", "deterministic")}
    return {**_attended(draw, False), "topk": draw.randint(1, 100), **flags}


def _dense(draw: random.Random, native: bool) -> dict[str, Any]:
    return {"heads": _heads(draw), **_channels(draw, False), "sink": draw.random() < 0.5}


def _indexer_backward(draw: random.Random, native: bool) -> dict[str, Any]:
    index = {"index_heads": draw.randint(1, 64), "index_head_dim": draw.choice(channels.INDEX_WIDTHS)}
    topk = draw.choice((0, draw.randint(1, 100)))
    options = {"score": draw.choice(("weighted_relu", "relu_bias")), "deterministic": topk > 0 and draw.random() < 0.5}
    return {"heads": _heads(draw), "d_qk": draw.randrange(64, 641, 16), **index, "topk": topk, **options}


def _select(draw: random.Random, native: bool) -> dict[str, Any]:
    topk = _topk(draw, 1, 4096)
    first = draw.choice((0, draw.randint(0, min(20, topk))))
    kept = {"keep_first": first, "keep_recent": draw.choice((0, draw.randint(0, min(20, topk - first))))}
    return {"topk": topk, **_listed(draw), **kept, "page": draw.choice((1, 64, draw.randint(1, 1024)))}


def _adapt(draw: random.Random, native: bool) -> dict[str, Any]:
    mass = draw.choice(("none", "chosen", "window"))
    by_row = {name: draw.random() < 0.5 for name in ("masses", "min_scores", "counts", "chosen_scores")}
    by_row["masses"] &= mass != "none"
    return {"topk": _topk(draw, 1, 4096), "mass": mass, **_listed(draw), **by_row}


def _candidates(draw: random.Random, native: bool) -> dict[str, Any]:
    return {"topk": _topk(draw, 1, 8192), "logits": draw.choice(("fp32", "bf16"))}


def _merge_lists(draw: random.Random, native: bool) -> dict[str, Any]:
    return {"topk": _topk(draw, 1, 8192)}


def _merge_parts(draw: random.Random, native: bool) -> dict[str, Any]:
    return {"d_v": draw.randint(1, 1024), "sink": draw.random() < 0.5, "dtype": draw.choice(("bf16", "fp32"))}


def _resolve(draw: random.Random, native: bool) -> dict[str, Any]:
    return {"topk": _topk(draw, 1, 8192), "page": draw.choice((1, 64, draw.randint(1, 1024))), "misses": draw.random() < 0.5}


def _expand(draw: random.Random, native: bool) -> dict[str, Any]:
    pool = draw.choice(presets.POOLS)
    blocks = draw.choice((draw.randint(1, max(1, 700 // pool)), draw.randint(1, 8192 // pool)))
    return {"blocks": blocks, "pool": pool, "output": draw.choice(("tokens", "slots"))}


def _pool(draw: random.Random, native: bool) -> dict[str, Any]:
    gates = draw.choice(("fp32", "bf16"))
    return {"head_dim": draw.choice(channels.INDEX_WIDTHS), "pool": draw.choice(presets.POOLS), "gates": gates}


DRAWN: dict[str, Callable[[random.Random, bool], dict[str, Any]]] = {
    "attention": _attention,
    "attention_gqa": _attention_gqa,
    "attention_paged": _attention_paged,
    "indexer": _indexer_prefill,
    "indexer_paged": _indexer_paged,
    "quantize": _quantize,
    "quantize_paged": _store,
    "gather_paged": _gather,
    "index_prologue": _index_prologue,
    "latent_prologue": _latent,
    "select": _select,
    "attention_backward": _backward,
    "attention_dense": _dense,
    "indexer_backward": _indexer_backward,
    "adapt": _adapt,
    "candidates": _candidates,
    "expand": _expand,
    "merge_lists": _merge_lists,
    "merge_parts": _merge_parts,
    "pool": _pool,
    "resolve": _resolve,
}
"""For each operation: the fields of a random spec."""
