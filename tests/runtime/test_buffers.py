"""Results in the caller's buffers: written to those and nothing else, checked like arguments, planned, captured by a trace."""

from __future__ import annotations

import math

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.errors import InputError
from dsa_codegen.ops.attention import AttentionSizes, AttentionSpec
from dsa_codegen.ops.attention_gqa import AttentionGqaSizes, AttentionGqaSpec
from dsa_codegen.ops.attention_paged import AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.ops.select import SelectSizes, SelectSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.runtime import dispatch, torch_ops

from plans_support import gpu
from support import arguments

SPECS = {
    "attention": (AttentionSpec(4, 576, 8, lengths=True, max_logits=True), AttentionSizes(3, 20)),
    "attention_gqa": (AttentionGqaSpec(4, 2, 16, 32, 3, 16, sink=True), AttentionGqaSizes(3, 50)),
    "attention_paged": (AttentionPagedSpec(4, 9, extra_topk=5, sink=True), AttentionPagedSizes(2, 2, 70)),
    "select": (SelectSpec(64), SelectSizes(3, 200)),
}
BY_OP = pytest.mark.parametrize("name", SPECS)


def problem(name, seed=0):
    """(operation, spec, arguments of its operator, poisoned buffers by the name of the result)."""
    op, (spec, sizes) = ops.get(name), SPECS[name]
    inputs = op.inputs(spec, Case(sizes, "ragged_normal" if name == "select" else "ragged"), Draw(seed))
    buffers = op.allocate(spec, inputs)
    for buffer in buffers.values():
        buffer.fill_(math.nan if buffer.is_floating_point() else 77)
    return op, spec, inputs, arguments(op, spec, inputs), buffers


@BY_OP
def test_the_reference_fills_the_buffers(name):
    op, spec, inputs, args, buffers = problem(name)
    assert torch_ops.function(f"{op.function}_into")(*args, *buffers.values()) is None
    for result, value in op.reference(spec, inputs).items():
        assert torch.equal(buffers[result], value.to(buffers[result].dtype))


@BY_OP
def test_the_operator_is_what_torch_asks_of_one(name):
    op, _, _, args, buffers = problem(name)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch_ops.function(f"{op.function}_into"), (*args, *buffers.values()), test_utils=tests)


@BY_OP
def test_a_trace_writes_to_the_buffers(name):
    op, spec, inputs, args, buffers = problem(name)
    operator = torch_ops.function(f"{op.function}_into")
    torch.compile(lambda *values: operator(*values), backend="aot_eager", fullgraph=True)(*args, *buffers.values())
    for result, value in op.reference(spec, inputs).items():
        assert torch.equal(buffers[result], value.to(buffers[result].dtype))


@BY_OP
def test_a_wrong_buffer_is_refused(name):
    op, _, _, args, buffers = problem(name)
    for at, (result, buffer) in enumerate(buffers.items()):
        argument = "out" if result == "chosen" else result
        strided = torch.stack([buffer, buffer], -1)[..., 0]
        for wrong in (buffer[1:], buffer.double(), strided):
            changed = [*list(buffers.values())[:at], wrong, *list(buffers.values())[at + 1 :]]
            with pytest.raises(InputError, match=f"^{argument}:"):
                torch_ops.function(f"{op.function}_into")(*args, *changed)


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
@pytest.mark.usefixtures("fresh_dispatch")
@BY_OP
def test_a_plan_launches_into_the_buffers_of_its_call(name, monkeypatch):
    _, kernels = gpu(monkeypatch)
    into = torch_ops.direct(f"{ops.get(name).function}_into")
    for seed in (0, 1, 2):
        _, _, _, args, buffers = problem(name, seed)
        kernels.launched.clear()
        assert into(*args, *buffers.values()) is None
        launched = [value for _, _, values in kernels.launched for value in values]
        assert all(any(value is buffer for value in launched) for buffer in buffers.values())
    assert len(dispatch._plans) == 1


def test_the_functions_return_the_buffers_they_were_given():
    q, kv = torch.randn(3, 4, 576).bfloat16(), torch.randn(20, 1, 576).bfloat16()
    indices = torch.randint(0, 20, (3, 1, 8), dtype=torch.int32)
    expected = dsa.sparse_attention(q, kv, indices, 0.04)
    buffers = tuple(torch.empty_like(value) for value in expected)
    highest = torch.empty_like(expected[1])
    for options in ({"out": buffers[0]}, {"lse": buffers[1]}, {"max_logits": highest}):
        results = dsa.sparse_attention(q, kv, indices.long(), 0.04, **options)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        assert all(any(value is result for result in results) for name, value in options.items() if name != "max_logits")
    assert (highest <= expected[1]).all()
    scores, ends, chosen = torch.randn(3, 200), torch.full((3,), 200, dtype=torch.int32), torch.empty(3, 64, dtype=torch.int32)
    assert dsa.select(scores, ends, 64, out=chosen) is chosen
    assert torch.equal(chosen, dsa.select(scores, ends, 64))
