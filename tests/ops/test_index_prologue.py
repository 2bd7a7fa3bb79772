"""The indexer's prologue: against the reference, what the reference means, what it refuses, what it compiles to."""

from __future__ import annotations

import math

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.index_prologue import OP, IndexPrologueSizes, IndexPrologueSpec
from dsa_codegen.ops.index_prologue.problem import hadamard_matrix
from dsa_codegen.problem import presets
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import H200, arguments, assert_compiles, assert_matches_reference, run_interpreted

SPECS = OP.options(OP.specs(presets.preset("tiny"))[0])
SMALL = Config.of("triton", block_h=8, block_t=16, num_warps=4)


@pytest.mark.parametrize("case", OP.cases(SPECS[0])[1:], ids=lambda case: case.id)
def test_matches_the_reference(interpreter, case):
    assert_matches_reference(interpreter, OP, SPECS[0], SMALL, case)


def config(spec):
    return SMALL if spec.heads else SMALL.replace(block_h=1)


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda spec: spec.id)
def test_matches_the_reference_with_options(interpreter, spec):
    assert_matches_reference(interpreter, OP, spec, config(spec), Case(IndexPrologueSizes(3), "repeated"))


@pytest.mark.parametrize("spec", SPECS[1:3], ids=lambda spec: spec.id)  # the first is compiled for every GPU, with its default
def test_compiles_for_hopper(spec):
    assert_compiles(OP, spec, config(spec))


def test_keys_alone_are_stored_as_with_queries():
    """A step that scores nothing has no queries."""
    inputs = plain()
    alone = {**inputs, "cache": inputs["cache"].clone(), "q": inputs["q"][:, :0], "weights": inputs["weights"][:, :0]}
    values, folded = call(alone)
    assert (values.shape, folded.shape) == ((6, 0, 64), (6, 0))
    call(inputs)
    assert inputs["cache"].any()
    assert torch.equal(alone["cache"], inputs["cache"])


@pytest.mark.parametrize(
    "fields", [{"heads": 65}, {"head_dim": 40}, {"d_rope": 128}, {"rotary": "none"}, {"norm": "fp16"}, {"hadamard": 1}], ids=str
)
def test_spec_refuses(fields):
    with pytest.raises(SpecError):
        IndexPrologueSpec.from_dict({"heads": 8, "head_dim": 64, **fields})


def drawn(spec=SPECS[0], tokens=5):
    return OP.inputs(spec, Case(IndexPrologueSizes(tokens)), Draw(4))


def call(inputs, **options):
    named = {name: value for name, value in inputs.items() if name != "eps"}
    return dsa.index_prologue(*named.values(), **options)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", {"q": torch.zeros(5, 8, 64)}),
        ("q", {"q": torch.zeros(5, 8, 72, dtype=torch.bfloat16)[..., :64]}),
        ("weights", {"weights": torch.zeros(5, 7)}),
        ("k", {"k": torch.zeros(4, 64, dtype=torch.bfloat16)}),
        ("norm_weight", {"norm_weight": None}),
        ("norm_bias", {"norm_bias": torch.zeros(64, dtype=torch.bfloat16)}),
        ("cos_sin", {"cos_sin": torch.zeros(9, 64, dtype=torch.bfloat16)}),
        ("cos_sin", {"cos_sin": torch.zeros(9, 40)}),
        ("positions", {"positions": torch.zeros(5, dtype=torch.int32)}),
        ("slots", {"slots": torch.zeros(4, dtype=torch.int64)}),
        ("cache", {"cache": torch.zeros(2, 64, 1, 64, dtype=torch.uint8)}),
    ],
)
def test_call_refuses(argument, change):
    with pytest.raises(InputError, match=f"^{argument}"):
        call({**drawn(), **change})


@pytest.mark.parametrize(("argument", "option"), [("rotary", {"rotary": "half"}), ("eps", {"eps": 0.0})])
def test_call_refuses_options(argument, option):
    with pytest.raises(InputError, match=f"^{argument}"):
        call(drawn(), **option)


def unquantised(inputs, **options):
    """(q with its scales, k) as a call leaves them, in fp32."""
    values, folded = call({**inputs, "weights": torch.ones_like(inputs["weights"])}, **options)
    heads, width = values.shape[1:]
    q = values.float() * (folded * (heads * width) ** 0.5)[..., None]
    slots = inputs["slots"]
    return q, IndexKLayout(64, width).dequantize(inputs["cache"], slots)


def plain(tokens=6):
    """Inputs of ordinary size whose slots are all there."""
    draw = Draw(9)
    inputs = {**drawn(tokens=tokens), "slots": torch.arange(tokens)}
    for name, shape in (("q", (tokens, 8, 64)), ("k", (tokens, 64))):
        inputs[name] = draw.normal(*shape, dtype=torch.bfloat16)
    return inputs


@pytest.mark.parametrize("rotary", ["half_split", "interleaved"])
def test_products_depend_on_distances_only(rotary):
    """What rotary position is for; and the Hadamard rotation leaves all products as they are."""
    inputs = plain()
    near, far = ({**inputs, "positions": inputs["positions"] % 20 + shift} for shift in (0, 17))
    products = []
    for given, turned in ((near, False), (far, False), (near, True)):
        q, k = unquantised({**given, "cache": given["cache"].clone()}, rotary=rotary, hadamard=turned)
        products.append(torch.einsum("qhd,kd->qhk", q, k))
    for other in products[1:]:
        torch.testing.assert_close(other, products[0], rtol=0.1, atol=1.5)


def test_the_first_position_is_normalised_only():
    inputs = plain()
    q, k = unquantised({**inputs, "positions": torch.zeros_like(inputs["positions"])})
    weight, bias = inputs["norm_weight"], inputs["norm_bias"]
    expected = torch.nn.functional.layer_norm(inputs["k"].float(), (64,), weight, bias, 1e-6)
    torch.testing.assert_close(k, expected, rtol=2**-4, atol=2e-2)
    torch.testing.assert_close(q, inputs["q"].float(), rtol=2**-4, atol=2e-2)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_rotation_is_its_own_inverse(width):
    matrix = hadamard_matrix(width)
    torch.testing.assert_close(matrix @ matrix, torch.eye(width))
    torch.testing.assert_close(matrix[1, :4] * width**0.5, torch.tensor([1.0, -1.0, 1.0, -1.0]))


def broken():
    """A NaN in one head of q, one in a key, and a position that the table does not have."""
    inputs = plain()
    inputs["q"][1, 3, 40] = math.nan
    inputs["k"][2, 5] = math.nan
    inputs["positions"][4] = 50
    return inputs


def assert_broken_where_it_should_be(values, folded, keys):
    rows = values.float().isnan().all(-1)
    assert torch.equal(rows, values.float().isnan().any(-1))
    assert rows.nonzero().tolist() == [[1, 3], *([4, head] for head in range(8))]
    assert torch.equal(folded.isnan(), rows)
    assert keys.isnan().all(-1).nonzero().flatten().tolist() == [2, 4]
    assert keys.isnan().any(-1).sum() == 2


def test_what_is_not_a_number_stays_visible(interpreter):
    inputs = broken()
    interpreted = run_interpreted(interpreter, OP.name, SPECS[0], SMALL, inputs)
    values, folded = call(inputs)
    layout = IndexKLayout(64, 64)
    for outputs in ({"values": values, "folded": folded, "cache": inputs["cache"]}, interpreted):
        assert_broken_where_it_should_be(
            outputs["values"], outputs["folded"], layout.dequantize(outputs["cache"], inputs["slots"])
        )


def test_a_wrong_result_is_seen():
    inputs = drawn(tokens=20)
    outputs = OP.reference(SPECS[0], inputs)
    assert OP.check(SPECS[0], inputs, outputs, outputs).passed
    for name in outputs:
        wrong = outputs[name].clone().view(torch.uint8)
        wrong[0].view(-1)[3] ^= 0x40
        assert not OP.check(SPECS[0], inputs, {**outputs, name: wrong.view(outputs[name].dtype)}, outputs).passed, name
    beside = outputs["cache"].clone()
    beside[-1].view(-1)[3] = 8
    assert not OP.check(SPECS[0], inputs, {**outputs, "cache": beside}, outputs).passed


def test_strided_projections_are_taken_as_they_are():
    """q, k and the weights as parts of one wide projection."""
    inputs = plain()
    weights = inputs["weights"].bfloat16()
    parts = inputs["q"].flatten(1), inputs["k"], weights, torch.zeros(6, 8, dtype=torch.bfloat16)
    q, k, strided, _ = torch.cat(parts, 1).split([part.shape[1] for part in parts], 1)
    packed = {**inputs, "weights": weights, "cache": inputs["cache"].clone()}
    expected = call(packed)
    got = call({**inputs, "q": q.unflatten(1, (8, 64)), "k": k, "weights": strided})
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))
    assert torch.equal(inputs["cache"], packed["cache"])


def test_launches_one_kernel_and_claims_where_there_are_many():
    for tokens, kernels in ((0, []), (4096, ["index_prologue"]), (8193, ["claim", "claim", "index_prologue"])):
        inputs = OP.inputs(SPECS[0], Case(IndexPrologueSizes(tokens)), Draw(0, "meta"))
        launches = OP.launches(SPECS[0], SMALL, inputs, OP.allocate(SPECS[0], inputs), H200)
        assert [launch.kernel for launch in launches] == kernels


def test_arguments_of_the_operator_are_those_of_the_inputs():
    inputs = drawn()
    spec, sizes, bound = OP.bind(*arguments(OP, SPECS[0], inputs))
    assert (spec, sizes) == (SPECS[0], IndexPrologueSizes(5))
    assert bound.keys() == inputs.keys()
