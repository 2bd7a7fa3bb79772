"""Where there is no row, as on a rank without a sequence, an operation launches nothing; its results are its reference's."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.errors import NoConfig
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.problem.presets import preset
from dsa_codegen.proof.verify import poison

from support import H200, arguments

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = (preset("tiny"), preset("tiny-gqa"), replace(preset("tiny"), pool=4, topk=256))


def without_rows(op, spec, device):
    """The inputs of a call whose first size (rows, queries, tokens, batch) is 0, as the operation binds them."""
    case = op.cases(spec)[0]
    sizes = replace(case.sizes, **{fields(case.sizes)[0].name: 0})
    inputs = op.inputs(spec, Case(sizes, case.distribution), Draw(0, device))
    bound, sizes, taken = op.bind(*arguments(op, spec, inputs))
    return bound, sizes, {**inputs, **taken}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ops.all_ops())
def test_nothing_is_launched_and_results_are_the_references(name, device):
    op = ops.get(name)
    specs = [spec for model in MODELS for spec in op.specs(model)]
    assert specs
    for own in specs:
        spec, sizes, inputs = without_rows(op, own, device)
        for backend in op.backends:
            try:
                config = op.default_config(spec, sizes, H200, backend)
            except NoConfig:
                continue  # of other heads
            outputs = op.allocate(spec, inputs)
            poison(outputs)
            assert list(op.launches(spec, config, inputs, outputs, H200)) == []
            for key, value in op.reference(spec, inputs).items():  # a cache is its caller's, poison and all
                assert outputs[key].shape == value.shape
                assert torch.equal(outputs[key].float(), value.float()), key
