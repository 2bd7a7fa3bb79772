"""The backward of sparse MLA: its formulas against finite differences, its kernels against the formulas."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops import inverse_lists as lists
from dsa_codegen.ops import needs
from dsa_codegen.ops.attention import OP as FORWARD
from dsa_codegen.ops.attention_backward import OP, AttentionBackwardSizes, AttentionBackwardSpec, formulas
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

from support import H200, assert_compiles, assert_matches_reference, run_interpreted

PLAIN = AttentionBackwardSpec(16, 576, 40)
EVERYTHING = AttentionBackwardSpec(5, 576, 37, lengths=True, sink=True, lse_gradient=True, deterministic=True)
WIDE = AttentionBackwardSpec(40, 512, 40, sink=True)
RAGGED = Case(AttentionBackwardSizes(3, 60), "ragged")


def config(spec, **changes):
    return OP.default_config(spec, OP.workloads(spec)[0].sizes, H200).replace(**changes)


@pytest.mark.parametrize(
    ("spec", "case"),
    [
        (PLAIN, Case(AttentionBackwardSizes(2, 60), "random")),
        (EVERYTHING, RAGGED),
        (WIDE, RAGGED),
        (replace(WIDE, d_qk=576, lengths=True), RAGGED),
        (replace(WIDE, deterministic=True, lse_gradient=True), Case(AttentionBackwardSizes(1, 1), "ragged")),
        (EVERYTHING, Case(AttentionBackwardSizes(3, 0), "ragged")),
        (EVERYTHING, Case(AttentionBackwardSizes(0, 9), "ragged")),
    ],
    ids=lambda value: value.id,
)
def test_matches_the_formulas(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, config(spec), case)


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
def test_ends_of_lists_that_name_no_token_are_left_out(interpreter, with_lengths):
    """From nothing listed to a token at the last place: no tile with a token is missed, however late it stands."""
    spec = replace(PLAIN, topk=300, lengths=with_lengths)
    inputs = dict(OP.inputs(spec, Case(AttentionBackwardSizes(6, 400), "random"), Draw(5)))
    for query, last in enumerate((0, 1, 128, 129, 290, 300)):
        inputs["indices"][query, 0, last:] = 400 if query % 2 else -1
        inputs["indices"][query, 0, : max(last - 2, 0) : 3] = -1
    if with_lengths:
        inputs["lengths"] = torch.tensor([5, 1, 100, 300, 300, 299], dtype=torch.int32)
    attended = FORWARD.reference(FORWARD.spec_type(16, 576, 300, lengths=with_lengths), inputs)
    inputs |= {"out": attended["out"].bfloat16(), "lse": attended["lse"]}
    outputs = run_interpreted(interpreter, OP.name, spec, config(spec), inputs)
    accuracy = OP.check(spec, inputs, outputs, OP.reference(spec, inputs))
    assert accuracy.passed, accuracy.detail


def test_chunks_of_queries_add_up(interpreter, monkeypatch):
    """More queries than are written down at a time: the kernels get the parts of one call after the other."""
    from dsa_codegen.ops.attention_backward import kernels

    launches = []
    for spec in (PLAIN, replace(PLAIN, deterministic=True)):
        monkeypatch.setattr(kernels, "_WEIGHT_BYTES", 2 * 4 * 40 * 16)
        monkeypatch.setattr(lists, "_ROW_BYTES", 2 * 4 * 40 * 576)
        inputs = OP.inputs(spec, Case(AttentionBackwardSizes(5, 60), "ragged"), Draw(0))
        outputs = OP.allocate(spec, inputs)
        launches.append([each for each in OP.launches(spec, config(spec), inputs, outputs, H200) if each.kernel == "scores"])
    assert [[each.args[-3] for each in found] for found in launches] == [[0, 2, 4]] * 2
    assert [found[-1].grid[0] * 2 for found in launches] == [found[0].grid[0] for found in launches]
    assert inputs["order"].shape == (3, 80) and inputs["offsets"].shape == (3, 61)


@pytest.mark.parametrize("name", ["dq", "dkv", "dsink"])
def test_a_planted_error_is_caught(name):
    inputs = OP.inputs(EVERYTHING, RAGGED, Draw(0))
    reference = OP.reference(EVERYTHING, inputs)
    right = {key: value.clone() for key, value in reference.items()}
    assert OP.check(EVERYTHING, inputs, right, reference).passed
    for plant in (_one_element, lambda value: value.mul_(1.01), lambda value: value.copy_(value.roll(1, 0))):
        wrong = {**right, name: right[name].clone()}
        plant(wrong[name])
        accuracy = OP.check(EVERYTHING, inputs, wrong, reference)
        assert not accuracy.passed and name in accuracy.detail


def _one_element(value):
    value.view(-1)[value.abs().argmax()] *= 1.5


PLANTS = [
    ("scale", {"sm_scale": 0.9}, {"dq", "dkv"}),
    ("no sink", {"sink": None}, {"dq", "dkv"}),
    ("no gradient of lse", {"dlse": None}, {"dq", "dkv"}),
    ("all entries", {"lengths": None}, {"dq", "dkv"}),
    ("another out", {"out": 0.0}, {"dq", "dkv", "dsink"}),
]


@pytest.mark.parametrize(("changes", "caught"), [plant[1:] for plant in PLANTS], ids=[plant[0] for plant in PLANTS])
def test_each_term_of_the_formulas_counts(changes, caught):
    """A kernel that forgot a term would compute this, and would be found out in every gradient that the term is part of."""
    inputs = OP.inputs(EVERYTHING, RAGGED, Draw(0))
    reference = OP.reference(EVERYTHING, inputs)
    changes = {name: inputs[name] * value if isinstance(value, float) else value for name, value in changes.items()}
    other = {**reference, **OP.reference(EVERYTHING, {**inputs, **changes})}
    for name, value in reference.items():
        accuracy = OP.check(EVERYTHING, inputs, {**reference, name: other[name]}, reference)
        assert accuracy.passed != (name in caught), name
        assert value.isfinite().all()


class Attend(torch.autograd.Function):
    """The forward's formula with the backward's, so that gradcheck compares the one with differences of the other."""

    @staticmethod
    def forward(ctx, q, kv, sink, indices, lengths):
        out, lse = formulas.attend(q, kv, indices, 0.3, lengths, sink, d_v=3)  # of 5 channels
        ctx.save_for_backward(q, kv, indices, out, lse, sink)
        ctx.lengths = lengths
        return out, torch.where(lse.isfinite(), lse, 0.0)

    @staticmethod
    def backward(ctx, do, dlse):
        q, kv, indices, out, lse, sink = ctx.saved_tensors
        return *formulas.gradients(q, kv, indices, 0.3, out, lse, do, dlse, ctx.lengths, sink), None, None


@pytest.mark.parametrize("with_sink", [False, True], ids=["plain", "sink"])
def test_the_formulas_pass_gradcheck_in_fp64(with_sink):
    draw = Draw(1)
    q, kv = draw.normal(4, 2, 5).double().requires_grad_(), draw.normal(6, 1, 5).double().requires_grad_()
    sink = draw.normal(2).double().requires_grad_() if with_sink else None
    indices = torch.tensor([[[0, 1, 5, 3]], [[-1, 2, 6, 2]], [[4, 1, 0, -7]], [[-1, -1, 9, 8]]], dtype=torch.int32)
    lengths = torch.tensor([4, 4, 2, 4], dtype=torch.int32) if with_sink else None
    assert torch.autograd.gradcheck(Attend.apply, (q, kv, sink, indices, lengths))


def test_the_formulas_forward_is_the_attention_reference():
    forward = {"heads": 5, "d_qk": 576, "topk": 37, "lengths": True, "sink": True}
    op = needs.ops.get("attention")
    spec = op.spec_type(**forward)
    inputs = op.inputs(spec, Case(op.sizes_type(3, 60), "ragged"), Draw(0))
    wide = {name: inputs[name].float() for name in ("q", "kv", "sink")}
    out, lse = formulas.attend(**wide, **{name: inputs[name] for name in ("indices", "sm_scale", "lengths")})
    reference = op.reference(spec, inputs)
    torch.testing.assert_close(out, reference["out"])
    torch.testing.assert_close(lse, reference["lse"])


def test_inverse_lists_hold_every_entry_once_in_order(monkeypatch):
    monkeypatch.setattr(lists, "_ROW_BYTES", 2 * 4 * 4 * 576)
    indices = torch.tensor([[[3, 1, -1, 1]], [[7, 0, 3, 1]], [[2, 2, 9, 0]]], dtype=torch.int32)
    order, offsets = lists.inverse_lists(indices, 4, 576, torch.tensor([4, 3, 4], dtype=torch.int32))
    found = [
        [part[begin:end].tolist() for begin, end in itertools.pairwise(edges)]
        for part, edges in zip(order, offsets.tolist(), strict=True)
    ]
    assert found == [[[5], [1, 3], [], [0, 6]], [[3], [], [0, 1], []]]


def test_every_option_compiles_for_hopper():
    spec = replace(EVERYTHING, heads=64, topk=2048)
    assert_compiles(OP, spec, config(spec))


@pytest.mark.parametrize(
    ("changes", "gpu", "name"),
    [({"dq_d": 256, "dq_warps": 4}, "h200", "dq accumulator"), ({"score_stages": 4, "score_d": 128}, "h200", "score smem")],
)
def test_constraints_name_what_does_not_fit(changes, gpu, name):
    found = OP.violations(AttentionBackwardSpec(128, 576, 2048), config(PLAIN, **changes), resolve(gpu))
    assert any(violation.name.startswith(name) for violation in found)


def arguments(**changes):
    """A valid call's arguments in the order of the schema, with some of them changed."""
    given = {**OP.inputs(EVERYTHING, RAGGED, Draw(0)), **changes}
    names = [argument.name for argument in torch._C.parse_schema(f"any::{OP.function}{OP.schema}").arguments]
    return [given[name] for name in names]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 5, 576, dtype=torch.float16)),
        ("kv", torch.zeros(60, 1, 512, dtype=torch.bfloat16)),
        ("out", torch.zeros(3, 5, 512)),
        ("do", torch.zeros(3, 5, 576, dtype=torch.bfloat16)),
        ("lse", torch.zeros(3, 4)),
        ("dlse", torch.zeros(3, 5, dtype=torch.bfloat16)),
        ("order", torch.zeros(1, 3, dtype=torch.int32)),
        ("offsets", None),
        ("sm_scale", -1.0),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*arguments(**{argument: value}))


def test_bind_reads_the_spec_off_the_arguments():
    spec, sizes, inputs = OP.bind(*arguments())
    assert (spec, sizes) == (EVERYTHING, RAGGED.sizes)
    assert inputs.keys() == OP.inputs(EVERYTHING, RAGGED, Draw(0)).keys()


@pytest.mark.parametrize(("field", "value"), [("heads", 129), ("d_qk", 100_000), ("topk", 0), ("deterministic", 1)])
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        AttentionBackwardSpec.from_dict({"heads": 64, "d_qk": 576, "topk": 64, field: value})


def test_serving_needs_no_backward():
    model = presets.preset("tiny")
    assert OP not in [op for op, _ in needs.specs(model)]
    assert needs.specs(model, [OP.name]) == [(OP, spec) for spec in OP.specs(model)]
