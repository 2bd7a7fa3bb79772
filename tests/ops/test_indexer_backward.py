"""What the indexer learns from: formulas against finite differences and torch's own KL, kernels against the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops import needs
from dsa_codegen.ops.indexer_backward import OP, IndexerBackwardSizes, IndexerBackwardSpec, formulas, kernels
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

from support import H200, assert_compiles, assert_matches_reference

SPARSE = IndexerBackwardSpec(5, 576, 8, 64, topk=37)
DENSE = IndexerBackwardSpec(20, 512, 10, 32, score="relu_bias")
SMALL_SPILL = 64  # bytes; half the tokens a step would avoid it, and takes longer
RAGGED = Case(IndexerBackwardSizes(3, 77), "ragged")


def config(spec, **changes):
    return OP.default_config(spec, OP.workloads(spec)[0].sizes, H200).replace(**changes)


@pytest.mark.parametrize(
    ("spec", "case"),
    [
        (SPARSE, RAGGED),
        (replace(SPARSE, score="relu_bias", deterministic=True), RAGGED),
        (DENSE, RAGGED),
        (replace(DENSE, score="weighted_relu"), Case(IndexerBackwardSizes(4, 150), "random")),
        (DENSE, Case(IndexerBackwardSizes(3, 0), "ragged")),
        (SPARSE, Case(IndexerBackwardSizes(0, 9), "ragged")),
    ],
    ids=lambda value: value.id,
)
def test_matches_the_formulas(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, config(spec, score_n=32, grad_n=32, token_n=64), case)


@pytest.mark.parametrize("spec", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_compiles_for_hopper(spec):
    spec = replace(spec, heads=128, index_heads=64, index_head_dim=128, deterministic=not spec.dense)
    assert_compiles(OP, spec, config(spec), spills=SMALL_SPILL)


def test_memory_does_not_grow_with_queries_times_tokens(monkeypatch):
    """Of 4096 queries with 32K tokens 1024 at a time are in memory, and every query is among them once."""
    spec = replace(DENSE, heads=16)
    inputs = OP.inputs(spec, Case(IndexerBackwardSizes(4096, 32768), "random"), Draw(0, "meta"))
    launches = OP.launches(spec, config(spec), inputs, OP.allocate(spec, inputs), H200)
    compared = [launch for launch in launches if launch.kernel == "compare"]
    assert [launch.args[-3] for launch in compared] == [0, 1024, 2048, 3072]
    assert compared[0].args[-5].shape == (1024, 32768)
    workspaces = {id(value): value.numel() * 4 for launch in launches for value in launch.args if hasattr(value, "numel")}
    assert max(workspaces.values()) <= kernels._BYTES


@pytest.mark.parametrize("name", ["loss", "diq", "dik", "diw"])
def test_a_planted_error_is_caught(name):
    inputs = OP.inputs(SPARSE, RAGGED, Draw(0))
    reference = OP.reference(SPARSE, inputs)
    assert OP.check(SPARSE, inputs, reference, reference).passed
    for plant in (_one_element, lambda value: value.mul_(1.01), lambda value: value.copy_(value.roll(1, 0))):
        wrong = {**reference, name: reference[name].clone()}
        plant(wrong[name])
        accuracy = OP.check(SPARSE, inputs, wrong, reference)
        assert not accuracy.passed and name in accuracy.detail


def _one_element(value):
    value.view(-1)[value.abs().argmax()] *= 1.5


class Learn(torch.autograd.Function):
    """The loss with the gradients that come with it, so that gradcheck compares them with its differences."""

    @staticmethod
    def forward(ctx, iq, ik, iw, q, kv, total, columns, score):
        learned = formulas.learn(q, kv, total, iq, ik, iw, 0.3, columns, score)
        ctx.save_for_backward(*learned[1:])
        return learned.loss.sum()

    @staticmethod
    def backward(ctx, grad):
        return *[grad * each for each in ctx.saved_tensors], None, None, None, None, None


def small(dense):
    draw = Draw(2)
    q, kv, total = draw.normal(4, 3, 6).double(), draw.normal(7, 1, 6).double(), draw.normal(4, 3).double()
    indexer = [each.double().requires_grad_() for each in (draw.normal(4, 2, 5), draw.normal(7, 5), draw.normal(4, 2))]
    indices = torch.tensor([[[0, 1, 5, 3]], [[-1, 2, 6, 4]], [[4, 1, 0, -7]], [[-1, -1, 9, 8]]], dtype=torch.int32)
    starts, ends = torch.tensor([0, 2, 5, -1], dtype=torch.int32), torch.tensor([7, 5, 5, 3], dtype=torch.int32)
    columns = formulas.Columns(None, starts, ends) if dense else formulas.Columns(indices, None, None)
    return indexer, (q, kv, total), columns


@pytest.mark.parametrize("score", ["weighted_relu", "relu_bias"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_the_formulas_pass_gradcheck_in_fp64(dense, score):
    indexer, attention, columns = small(dense)
    assert torch.autograd.gradcheck(lambda *x: Learn.apply(*x, *attention, columns, score), indexer)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_the_loss_is_torchs_kl(dense):
    indexer, (q, kv, total), columns = small(dense)
    loss = formulas.learn(q, kv, total, *indexer, 0.3, columns).loss
    token, valid = columns.of(slice(0, 4), 7)
    for query in range(4):
        chosen = token[query][valid[query]]
        scores = (indexer[0][query] @ indexer[1][chosen].T).relu().T @ indexer[2][query]
        weight = torch.exp(q[query] @ kv[chosen, 0].T * 0.3 - total[query, :, None]).sum(0)
        wanted = torch.nn.functional.kl_div(scores.log_softmax(0), weight / weight.sum(), reduction="sum")
        torch.testing.assert_close(loss[query], wanted)


def arguments(spec, **changes):
    given = {**OP.inputs(spec, RAGGED, Draw(0)), "score": spec.score, **changes}
    names = [argument.name for argument in torch._C.parse_schema(f"any::{OP.function}{OP.schema}").arguments]
    return [given[name] for name in names]


@pytest.mark.parametrize("spec", [SPARSE, DENSE, replace(SPARSE, deterministic=True)], ids=lambda spec: spec.id)
def test_bind_reads_the_spec_off_the_arguments(spec):
    found, sizes, inputs = OP.bind(*arguments(spec))
    assert (found, sizes) == (spec, RAGGED.sizes)
    assert inputs.keys() == OP.inputs(spec, RAGGED, Draw(0)).keys()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 5, 576, dtype=torch.float16)),
        ("total", torch.zeros(3, 4)),
        ("iq", torch.zeros(2, 8, 64, dtype=torch.bfloat16)),
        ("ik", torch.zeros(77, 32, dtype=torch.bfloat16)),
        ("iw", torch.zeros(3, 8, dtype=torch.bfloat16)),
        ("starts", torch.zeros(3, dtype=torch.int32)),
        ("score", "softmax"),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}|^indices"):
        OP.bind(*arguments(SPARSE, **{argument: value}))


@pytest.mark.parametrize(("field", "value"), [("index_heads", 65), ("index_head_dim", 40), ("topk", -1), ("score", "softmax")])
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        IndexerBackwardSpec.from_dict({**SPARSE.to_dict(), field: value})


def test_a_model_learns_from_whole_windows_and_from_chosen_tokens():
    model = presets.preset("tiny")
    assert [spec.topk for _, spec in needs.specs(model, [OP.name])] == [model.topk, 0]
    assert OP not in [op for op, _ in needs.specs(model)]
