"""The whole space that specs allow: random ones render, compile, and agree with the reference."""

from __future__ import annotations

import random

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.kernels.render import render
from dsa_codegen.proof import random_specs
from dsa_codegen.proof.verify import interpret

from support import H200, assert_compiles

CHEAP = ("attention", "gather_paged", "latent_prologue", "quantize_paged")
"""What the interpreter runs in about a second."""
QUICK = ("expand", "gather_paged", "indexer_paged", "quantize")
"""What compiles in two seconds."""
BACKENDS = ("triton", "gluon", "tilelang", "cuda")


def interpreted(interpreter, name, seed):
    """One random spec of an operation, with few tokens, on one of its small cases."""
    op, draw = ops.get(name), random.Random(f"{name}-{seed}")
    spec, config = random_specs.served(op, "triton", draw, H200)
    spec, case = random_specs.small(spec), draw.choice(op.cases(spec)[:3])
    accuracy = interpreter.call(interpret, op.name, spec, config, case, H200)
    assert accuracy.passed, (spec, config, case, accuracy.detail)


def test_every_operation_is_drawn():
    assert random_specs.DRAWN.keys() == ops.all_ops().keys()


@pytest.mark.parametrize("name", random_specs.DRAWN)
def test_every_field_of_a_spec_is_drawn(name):
    """More than one value of each, so that no field stays what it is by default."""
    op, draw = ops.get(name), random.Random(name)
    fields = [random_specs.drawn(op, draw).to_dict() for _ in range(300)]
    assert [field for field in fields[0] if len({each[field] for each in fields}) == 1] == []


@pytest.mark.parametrize("name", random_specs.DRAWN)
def test_random_specs_render(name):
    op, draw = ops.get(name), random.Random(name)
    texts = {render(op, *random_specs.served(op, "triton", draw, H200)).sha for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize("name", CHEAP)
def test_random_specs_agree_with_the_reference(interpreter, name):
    interpreted(interpreter, name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
@pytest.mark.parametrize("name", random_specs.DRAWN)
def test_more_random_specs_agree_with_the_reference(interpreter, name, seed):
    interpreted(interpreter, name, seed)


@pytest.mark.parametrize("name", QUICK)
def test_random_specs_compile(name):
    op = ops.get(name)
    assert_compiles(op, *random_specs.served(op, "triton", random.Random(f"{name} compiled"), H200))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_specs_compile_for_hopper(backend):
    for op, spec, config in random_specs.sample(14, 3, H200, backend):
        assert_compiles(op, spec, config, spills=512)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_specs_run(backend):
    from dsa_codegen import gpu

    found = gpu.detect()
    assert found is not None and torch.cuda.is_available()
    for op, spec, config in random_specs.sample(15, 4, found, backend):
        _, wrong = random_specs.prove(op.name, spec, config, found)
        assert not wrong, (op.name, spec, config, wrong)
