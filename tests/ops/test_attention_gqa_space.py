"""Sparse grouped-query attention over its whole space: random specs and configs render, compile and equal the reference."""

from __future__ import annotations

import random

import pytest

from dsa_codegen.gpu import detect
from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention_gqa import OP, AttentionGqaSizes, AttentionGqaSpec
from dsa_codegen.ops.attention_gqa.problem import sharing
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.problem.presets import BLOCKS
from dsa_codegen.proof.verify import verify

from support import H200, assert_compiles, assert_matches_reference


def drawn(seed: int, longest: int) -> tuple[AttentionGqaSpec, Config, Case]:
    """Any spec, a config that it can have, and sizes; lists of up to ``longest`` tokens."""
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 1, 2, 3, 4, 8) if longest > 500 else (1, 2, 3))
    group, block = draw.randint(1, 128 // kv_heads if longest > 500 else 6), draw.choice(BLOCKS)
    topk, page = draw.randint(1, max(1, longest // block)), draw.choice((0, 0, 1, 16, 48, 64, 128, 200))
    d_qk, d_v = (16 * draw.randint(1, 16 if longest > 500 else 6) for _ in range(2))
    ends, lengths, sink = (draw.random() < 0.5 for _ in range(3))
    share = sharing(draw.choice((1, 2, 4)), group, topk, 0)
    spec = AttentionGqaSpec(kv_heads * group, kv_heads, d_qk, d_v, topk, block, page, ends, lengths, sink, share)
    sizes = AttentionGqaSizes(4 * draw.randint(1, 3), draw.randint(1, 2 * longest))
    tables = {parameter.name: parameter.choices for parameter in OP.parameters("triton")}
    for _ in range(1000):
        config = Config.of("triton", **{name: draw.choice(choices) for name, choices in tables.items()})
        if not OP.violations(spec, config, H200):
            return spec, config, Case(sizes, draw.choice(("random", "ragged")))
    return spec, OP.default_config(spec, sizes, H200), Case(sizes, "ragged")


FEW, MANY = range(4), range(4, 64)
SEEDS = [*FEW, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_spec_equals_the_reference(interpreter, seed):
    spec, config, case = drawn(seed, longest=60)
    config = config.replace(splits=min(config["splits"], 3))  # each is a program more to interpret
    assert_matches_reference(interpreter, OP, spec, config, case)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 40))])
def test_any_spec_compiles(seed):
    spec, config, _ = drawn(seed, longest=3000)
    assert_compiles(OP, spec, config, spills=10**9)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(80))
def test_any_spec_equals_the_reference_on_a_gpu(seed):
    gpu = detect()
    assert gpu is not None
    spec, config, case = drawn(seed, longest=3000)
    if OP.violations(spec, config, gpu):
        config = OP.default_config(spec, case.sizes, gpu)
    variant = Variant(OP, spec, config, gpu, build.build(render(OP, spec, config), gpu).load())
    accuracy = verify(variant, case, "cuda", repeats=3)
    assert accuracy.passed, (spec.id, str(config), accuracy.detail)
