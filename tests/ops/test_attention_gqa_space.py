"""Sparse grouped-query attention over its whole space: random specs and configs render, compile and equal the reference."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dsa_codegen.gpu import detect
from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention_gqa import OP, AttentionGqaSizes, AttentionGqaSpec
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof import random_specs
from dsa_codegen.proof.verify import verify

from support import H200, assert_compiles, assert_matches_reference


def drawn(seed: int, small: bool = False) -> tuple[AttentionGqaSpec, Config, Case]:
    """Any spec, a config that it can have, and sizes; small ones for the interpreter."""
    draw = random.Random(seed)
    spec = random_specs.drawn(OP, draw)
    longest = 60 if small else 3000
    if small:
        kv_heads, topk = min(spec.kv_heads, 3), min(spec.topk, max(1, longest // spec.block))
        narrow = {name: min(getattr(spec, name), 96) for name in ("d_qk", "d_v")}
        spec = replace(spec, heads=kv_heads * min(spec.group, 6), kv_heads=kv_heads, topk=topk, **narrow)
    sizes = AttentionGqaSizes(4 * draw.randint(1, 2), draw.randint(1, 2 * longest))
    tables = {parameter.name: parameter.choices for parameter in OP.parameters("triton")}
    for _ in range(1000):
        config = Config.of("triton", **{name: draw.choice(choices) for name, choices in tables.items()})
        config = config.replace(splits=min(config["splits"], 3 if small else 64))  # each is a program more to interpret
        if not OP.violations(spec, config, H200):
            return spec, config, Case(sizes, draw.choice(("random", "ragged")))
    return spec, OP.default_config(spec, sizes, H200), Case(sizes, "ragged")


FEW, MANY = range(4), range(4, 64)
SEEDS = [*FEW, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_spec_equals_the_reference(interpreter, seed):
    spec, config, case = drawn(seed, small=True)
    assert_matches_reference(interpreter, OP, spec, config, case)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 40))])
def test_any_spec_compiles(seed):
    spec, config, _ = drawn(seed)
    assert_compiles(OP, spec, config, spills=10**9)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(80))
def test_any_spec_equals_the_reference_on_a_gpu(seed):
    gpu = detect()
    assert gpu is not None
    spec, config, case = drawn(seed)
    if OP.violations(spec, config, gpu):
        config = OP.default_config(spec, case.sizes, gpu)
    variant = Variant(OP, spec, config, gpu, build.build(render(OP, spec, config), gpu).load())
    accuracy = verify(variant, case, "cuda", repeats=3)
    assert accuracy.passed, (spec.id, str(config), accuracy.detail)
