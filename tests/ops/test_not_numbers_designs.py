"""Every design of paged attention (many heads, few rows, prompts, two pools): NaN stays in its row, one without tokens is 0."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dsa_codegen.gpu import detect
from dsa_codegen.kernels.build import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import staying
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem.caches import as_pages
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import poison

import emulator
from broken_rows import assert_padding
from paged_designs import CLUSTERS
from support import FURTHER, H200

FLAT = CLUSTERS.replace(flat=True)
OPTIONS = {"lengths": True, "sink": True}
POOLS = {**OPTIONS, "extra_topk": 90, "extra_page": 2, "extra_lengths": True}
BF16 = AttentionPagedSpec(16, 70, "bf16", **OPTIONS)
DESIGNS = {
    "channels": (AttentionPagedSpec(128, 300, **OPTIONS), CLUSTERS.replace(splits=2)),
    "alone": (AttentionPagedSpec(20, 70, page=7, **OPTIONS), CLUSTERS.replace(sharers=1)),
    "alone, 128 heads": (AttentionPagedSpec(128, 140, "v4", **OPTIONS), CLUSTERS.replace(sharers=1)),
    "alone, two pools": (AttentionPagedSpec(70, 70, "v4", **POOLS), CLUSTERS.replace(sharers=1)),
    "sharers": (AttentionPagedSpec(100, 200, **OPTIONS), CLUSTERS.replace(sharers=4)),
    "sharers, two pools": (AttentionPagedSpec(40, 70, "v4", **POOLS), CLUSTERS.replace(sharers=4)),
    "sharers, 528 bytes": (AttentionPagedSpec(64, 140, "v41", d_rope=0, **OPTIONS), CLUSTERS.replace(sharers=2)),
    "columns": (AttentionPagedSpec(64, 140, **OPTIONS), CLUSTERS.replace(sharers=2, columns=32)),
    "rounds": (AttentionPagedSpec(70, 140, "v4", **OPTIONS), CLUSTERS.replace(head_rounds=2)),
    "rounds, 656 bytes": (AttentionPagedSpec(128, 140, **OPTIONS), CLUSTERS.replace(head_rounds=2)),
    "rounds, two pools": (AttentionPagedSpec(40, 70, "v4", **POOLS), CLUSTERS.replace(head_rounds=1)),
    "prompts": (AttentionPagedSpec(128, 140, **OPTIONS), FLAT),
    "prompts, sorted": (AttentionPagedSpec(64, 140, **OPTIONS), FLAT.replace(sweep=True)),
    "prompts, few heads, sorted": (AttentionPagedSpec(16, 70, "v4", **OPTIONS), FLAT.replace(sweep=True)),
    "prompts, two pools": (AttentionPagedSpec(16, 70, "v4", **POOLS), FLAT),
    "prompts, BF16 pages": (BF16, FLAT),
    "Gluon, two pools": (AttentionPagedSpec(70, 70, "v4", **POOLS), Config.of("gluon", splits=1)),
    "Triton, BF16 pages": (
        BF16,
        Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="bits", splits=2),
    ),
}
FEW_SMS = 2  # of which each block takes several rows, and sorts lists where the config says so


def broken_step(spec, device):
    """Seven rows, as ``assert_padding`` has them: a listed token of the last is broken, of its second pool if it has one."""
    inputs = dict(OP.inputs(spec, Case(AttentionPagedSizes(7, 1, 100), "random"), Draw(7, device)))
    inputs["q"][1], inputs["q"][3], inputs["q"][4, 0, 2, 5] = math.nan, math.inf, math.nan
    for pool in ("", *(["extra_"] if spec.extra_topk else [])):
        indices, lengths, cache = (inputs[f"{pool}{name}"] for name in ("indices", "lengths", "cache"))
        indices[1], indices[3] = -1, cache.shape[0] * spec.page
        lengths.fill_(indices.shape[-1])
        lengths[2] = 0
    break_a_token(spec.extra_layout if spec.extra_topk else spec.layout, cache, indices)
    return inputs


def break_a_token(layout, cache, indices):
    """One that row 6 lists and no other: a NaN in its channel 130."""
    listed = indices[6, 0]
    slot = int(listed[(listed >= 0) & (listed < cache.shape[0] * layout.page)][0])
    indices[:6][indices[:6] == slot] = -1
    block, place = divmod(slot, layout.page)
    if layout.name == "bf16":
        cache[block, place, 0, 130] = math.nan
    else:
        as_pages(layout, cache)[block, layout.nope.base + place * layout.nope.stride + 130] = 0xFF


def assert_broken_alone(variant, inputs):
    outputs = variant.op.allocate(variant.spec, inputs)
    poison(outputs)
    results = variant.run(inputs, outputs)
    out, lse = results["out"][:, 0], results["lse"][:, 0]
    assert_padding(out, lse, True)
    assert out[6].isnan().all()
    assert lse[6].isnan().all()


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    "design",
    [
        pytest.param(design, marks=() if design == "alone" else FURTHER)
        for design, (_, config) in DESIGNS.items()
        if config.backend == "cuda"
    ],
)
def test_what_is_broken_stays_alone_emulated(design, tmp_path, monkeypatch):
    monkeypatch.setattr(staying, "_SORTED_FROM", 1)
    spec, config = DESIGNS[design]
    kernels = emulator.cuda_kernels(render(OP, spec, config), tmp_path, "shuffled")
    assert_broken_alone(Variant(OP, spec, config, replace(H200, sms=FEW_SMS), kernels), broken_step(spec, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_broken_stays_alone_in_every_design(design, monkeypatch):
    monkeypatch.setattr(staying, "_SORTED_FROM", 1)
    spec, config = DESIGNS[design]
    gpu = detect()
    if OP.violations(spec, config, gpu):
        pytest.skip(f"not for {gpu.name}")
    variant = Variant(OP, spec, config, gpu, build(render(OP, spec, config), gpu).load())
    assert_broken_alone(variant.within(FEW_SMS), broken_step(spec, "cuda"))


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_is_one_of_an_h200(design):
    spec, config = DESIGNS[design]
    assert not OP.violations(spec, config, H200)
