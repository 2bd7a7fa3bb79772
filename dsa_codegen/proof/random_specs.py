"""Random specs of the whole space that operations allow: what property tests render, compile, interpret and run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import ops
from ..errors import NoConfig, UnknownName
from ..gpu import Gpu
from ..kernels.build import build
from ..kernels.render import render
from ..kernels.variant import Variant
from ..ops.attention_gqa.problem import SHARES, sharing
from ..problem import channels, paged, presets
from ..problem.kv_layouts import KV_LAYOUTS
from ..problem.op import Config, Op
from ..problem.values import Spec
from .verify import verify


def _channels(draw: random.Random, native: bool) -> dict[str, int]:
    """d_qk and d_v of attention."""
    if native:
        return {"d_v": 512, "d_qk": draw.choice((512, 576))}
    d_v = draw.randrange(64, 513, 16)
    return {"d_v": d_v, "d_qk": d_v + draw.randrange(0, 129, 16)}


def _heads(draw: random.Random) -> int:
    return draw.choice((4, 8, 16, 32, 64, 128, draw.randint(1, 128)))


def _attention(draw: random.Random, native: bool) -> dict[str, Any]:
    flags = {name: draw.random() < 0.5 for name in ("lengths", "sink")}
    heads = 128 if native and draw.random() < 0.3 else _heads(draw)
    return {"heads": heads, "topk": draw.randint(1, 300), **_channels(draw, native), **flags}


def _attention_gqa(draw: random.Random, native: bool) -> dict[str, Any]:
    kv_heads, block = draw.choice((1, 1, 2, 3, 4, 8)), draw.choice(presets.BLOCKS)
    widths = {name: draw.randrange(16, 257, 16) for name in ("d_qk", "d_v")}
    flags = {name: draw.random() < 0.5 for name in ("ends", "lengths", "sink")}
    group, topk = draw.randint(1, 128 // kv_heads), draw.randint(1, max(1, 500 // block))
    share = sharing(draw.choice(SHARES), group, topk, 0)
    listed = {"topk": topk, "block": block, "page": draw.choice((0, 0, 1, 16, 48, 64, 128, 200)), "share": share}
    return {"heads": kv_heads * group, "kv_heads": kv_heads, **widths, **listed, **flags}


def _attention_paged(draw: random.Random, native: bool) -> dict[str, Any]:
    extra = {"extra_topk": draw.randint(1, 90), "extra_page": draw.randint(1, 80)} if draw.random() < 0.2 else {}
    common = {"heads": _heads(draw), "topk": draw.randint(1, 300), "page": draw.choice((1, 16, 64, draw.randint(1, 256)))}
    common |= {"lengths": draw.random() < 0.5, "sink": draw.random() < 0.5, **({} if native else extra)}
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
    return {**found, "score": score, "clean": draw.random() < 0.5, "logits": draw.choice(("fp32", "bf16"))}


def _indexer_prefill(draw: random.Random, native: bool) -> dict[str, Any]:
    return {**_indexer(draw, native), "compressed": draw.random() < 0.3}


def _indexer_paged(draw: random.Random, native: bool) -> dict[str, Any]:
    page = draw.choice((32, 64, 128, 256) if native else (16, 32, 64, 128, 256))
    return {**_indexer(draw, native), "next_n": draw.randint(1, 4), "page": page}


def _rows(draw: random.Random) -> dict[str, Any]:
    layout = draw.choice(paged.LAYOUTS)
    common = {
        "layout": layout,
        "width": draw.choice(paged.WIDTHS[layout]),
        "page": draw.choice((16, 64, draw.randint(16, 200))),
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
    return {**found, **styles, "power_of_two": _rounded(draw, found)}


def _index_prologue(draw: random.Random, native: bool) -> dict[str, Any]:
    head_dim = draw.choice(channels.INDEX_WIDTHS)
    styles = {"rotary": draw.choice(("interleaved", "half_split")), "rope_first": draw.random() < 0.5}
    found = {"heads": draw.randint(0, 64), "head_dim": head_dim, "d_rope": draw.randrange(0, min(head_dim, 128) + 1, 16)}
    norm = {"norm": draw.choice(("none", "fp32", "bf16")), "hadamard": head_dim in (32, 64, 128, 256) and draw.random() < 0.5}
    return {**found, **styles, **norm, "power_of_two": draw.random() < 0.5}


def _quantize(draw: random.Random, native: bool) -> dict[str, Any]:
    keys = draw.random() < 0.3
    heads = {} if keys else {"heads": draw.randint(1, 64), "weights": draw.choice(("fp32", "bf16"))}
    return {"width": draw.choice(channels.INDEX_WIDTHS), **heads, "power_of_two": draw.random() < 0.5}


def _backward(draw: random.Random, native: bool) -> dict[str, Any]:
    return {**_attention(draw, False), "topk": draw.randint(1, 100), "deterministic": draw.random() < 0.5}


def _dense(draw: random.Random, native: bool) -> dict[str, Any]:
    return {"heads": _heads(draw), **_channels(draw, False), "sink": draw.random() < 0.5}


def _indexer_backward(draw: random.Random, native: bool) -> dict[str, Any]:
    index = {"index_heads": draw.randint(1, 64), "index_head_dim": draw.choice(channels.INDEX_WIDTHS)}
    topk = draw.choice((0, draw.randint(1, 100)))
    options = {"score": draw.choice(("weighted_relu", "relu_bias")), "deterministic": topk > 0 and draw.random() < 0.5}
    return {"heads": _heads(draw), "d_qk": draw.randrange(64, 641, 16), **index, "topk": topk, **options}


def _select(draw: random.Random, native: bool) -> dict[str, Any]:
    topk = draw.randint(64, 700)
    kept = {"keep_first": draw.choice((0, draw.randint(0, 20))), "keep_recent": draw.choice((0, draw.randint(0, 20)))}
    return {"topk": topk, "scores": draw.choice(("fp32", "bf16")), "starts": draw.random() < 0.5, **kept}


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
}
"""For each operation: the fields of a random spec."""


def drawn(op: Op, draw: random.Random, native: bool = False) -> Spec:
    """A random spec; ``native`` ones have shapes that the templates for Hopper take."""
    return op.spec_type.from_dict(DRAWN[op.name](draw, native))


def served(op: Op, backend: str, draw: random.Random, gpu: Gpu) -> tuple[Spec, Config]:
    """A random spec that the backend serves, with the config that it is served by."""
    while True:
        spec = drawn(op, draw, backend != "triton")
        try:
            return spec, op.default_config(spec, op.workloads(spec)[0].sizes, gpu, backend)
        except NoConfig:
            if backend == "triton":
                raise


def configured(op: Op, spec: Spec, default: Config, draw: random.Random, gpu: Gpu) -> Config:
    """Any config of the default's backend that breaks no constraint; the default where a thousand drawn ones do."""
    ranges = {parameter.name: parameter.choices for parameter in op.parameters(default.backend)}
    for _ in range(1000):
        config = Config.of(default.backend, **{name: draw.choice(choices) for name, choices in ranges.items()})
        if not op.violations(spec, config, gpu):
            return config
    return default


def sample(
    count: int, seed: int, gpu: Gpu, backend: str = "triton", only: str | None = None, any_config: bool = False
) -> Iterator[tuple[Op, Spec, Config]]:
    """So many random specs, in turn of every operation that has a template of the backend, or of the one named.

    Each comes with its default config, or with any that it can have.

    Raises:
        UnknownName: ``only`` names no operation whose specs are drawn.
    """
    if only is not None and only not in DRAWN:
        raise UnknownName("operation of random specs", only, DRAWN)
    draw = random.Random(seed)
    able = [ops.get(name) for name in DRAWN if backend in ops.get(name).backends and name == (only or name)]
    for number in range(count if able else 0):
        op = able[number % len(able)]
        spec, config = served(op, backend, draw, gpu)
        yield op, spec, configured(op, spec, config, draw, gpu) if any_config else config


def prove(op_name: str, spec: Spec, config: Config, gpu: Gpu, repeats: int = 3) -> tuple[int, str]:
    """Run the small cases and one long one on the current GPU: (cases, what was wrong); a job for a ``Worker``."""
    op = ops.get(op_name)
    cases = [op.within_reach(spec, config, case) for case in (*op.cases(spec), *op.long_cases(spec)[:1])]
    variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load())
    for case in cases:
        accuracy = verify(variant, case, "cuda", repeats=repeats)
        if not accuracy.passed:
            return len(cases), f"{case.id}: {accuracy.detail}"
    return len(cases), ""


def checked(op_name: str, spec: Spec, config: Config, gpu: Gpu, run: bool) -> dict[str, Any]:
    """Build a spec and hold its resources against their limits; where it is to run, ``prove`` it; a job for a ``Worker``."""
    start = time.monotonic()
    used = build(render(ops.get(op_name), spec, config), gpu).resources.values()
    smem, spills = max(usage.smem for usage in used), max(usage.spills for usage in used)
    cases, wrong = 0, f"{smem} bytes of shared memory, {gpu.smem_per_block} allowed" if smem > gpu.smem_per_block else ""
    if run and not wrong:
        cases, wrong = prove(op_name, spec, config, gpu)
    seconds = round(time.monotonic() - start, 2)
    return {"spills": spills, "smem": smem, "cases": cases, "wrong": wrong, "seconds": seconds}


def small(spec: Spec) -> Spec:
    """The same with fewer tokens, for the interpreter."""
    fields = spec.to_dict()
    shorter = {"topk": min(int(fields["topk"]), 70)} if "topk" in fields and "heads" in fields else {}
    return type(spec).from_dict({**fields, **shorter})
