"""Dense MLA over windows: kernels against the formula, the formula against the sparse one over lists of every token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.errors import InputError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention_dense import OP, AttentionDenseSizes, AttentionDenseSpec, formulas
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.verify import verify

import emulator
from support import H200, assert_compiles, assert_matches_reference, completed

SPEC = AttentionDenseSpec(5, 576, sink=True)
PLAIN = AttentionDenseSpec(16, 512)
RAGGED = Case(AttentionDenseSizes(5, 97), "ragged")


def config(spec, **changes):
    return OP.default_config(spec, OP.workloads(spec)[0].sizes, H200).replace(**changes)


@pytest.mark.parametrize(
    ("spec", "case"),
    [
        (SPEC, RAGGED),
        (PLAIN, Case(AttentionDenseSizes(9, 130), "causal")),
        (SPEC, Case(AttentionDenseSizes(3, 0), "ragged")),
        (SPEC, Case(AttentionDenseSizes(0, 40), "ragged")),
    ],
    ids=lambda value: value.id,
)
def test_matches_the_formula(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, config(spec, block_m=32, block_n=32), case)


@pytest.mark.parametrize("spec", [AttentionDenseSpec(128, 576), AttentionDenseSpec(64, 512, True)], ids=lambda spec: spec.id)
def test_many_heads_are_served_by_pairs_of_tiles(spec):
    assert config(spec).backend == "cuda"
    assert_compiles(OP, spec, config(spec))


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_pairs_match_the_formula(tmp_path):
    """On one SM: windows of one pair of tiles, of several and of none follow each other, wherever they begin."""
    spec = AttentionDenseSpec(64, 512, sink=True)
    kernels = emulator.cuda_kernels(render(OP, spec, config(spec)), tmp_path, "shuffled")
    variant = Variant(OP, spec, config(spec), replace(H200, sms=1), kernels)
    for sizes, distribution in (((1, 1), "ragged"), ((4, 333), "ragged"), ((2, 300), "causal")):
        accuracy = verify(variant, Case(AttentionDenseSizes(*sizes), distribution), "cpu")
        assert accuracy.passed, (sizes, accuracy.detail)


@pytest.mark.parametrize(
    ("changes", "gpu", "name"),
    [({"heads": 80}, "h200", "heads"), ({"d_v": 448}, "h200", "channels"), ({}, "a100", "capability")],
)
def test_constraints_of_pairs_name_what_does_not_fit(changes, gpu, name):
    spec = AttentionDenseSpec(**{"heads": 128, "d_qk": 512, **changes})
    pairs = config(AttentionDenseSpec(128, 576))
    assert name in {violation.name for violation in OP.violations(spec, pairs, resolve(gpu))}
    assert OP.default_config(spec, OP.workloads(spec)[0].sizes, resolve(gpu)).backend == "triton"


@pytest.mark.parametrize("step", [1, 100], ids=["query by query", "at once"])
def test_the_formula_is_the_sparse_one_over_lists_of_every_token(monkeypatch, step):
    monkeypatch.setattr(formulas, "BYTES", step * 4 * 5 * 97)
    inputs = OP.inputs(SPEC, RAGGED, Draw(0))
    token = torch.arange(97, dtype=torch.int32).expand(5, -1)
    seen = (token >= inputs["starts"][:, None]) & (token < inputs["ends"][:, None])
    lists = torch.where(seen, token, -1)[:, None]
    sparse = ops.get("attention")
    wanted = sparse.reference(sparse.spec_type(5, 576, 97, sink=True), {**inputs, "indices": lists, "lengths": None})
    found = OP.reference(SPEC, inputs)
    for name in ("out", "lse"):
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_planted_error_is_caught(name):
    inputs = OP.inputs(SPEC, RAGGED, Draw(0))
    reference = OP.reference(SPEC, inputs)
    wrong = {**reference, name: reference[name].roll(1, 1)}
    assert OP.check(SPEC, inputs, reference, reference).passed
    assert not OP.check(SPEC, inputs, wrong, reference).passed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(5, 5, 576, dtype=torch.float16)),
        ("kv", torch.zeros(97, 576, dtype=torch.bfloat16)),
        ("starts", torch.zeros(5, dtype=torch.int64)),
        ("ends", torch.zeros(4, dtype=torch.int32)),
        ("sink", torch.zeros(4)),
        ("sm_scale", 0.0),
    ],
)
def test_call_refuses(argument, value):
    given = {**OP.inputs(SPEC, RAGGED, Draw(0)), argument: value}
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*completed(OP, *(given[name] for name in ("q", "kv", "sm_scale", "starts", "ends", "sink"))))
