"""Plans: a call like an earlier one launches what it would have launched without a plan; any other goes the long way."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsa_codegen import functions, ops
from dsa_codegen.errors import DsaError, InputError, SpecError
from dsa_codegen.kernels.tma import Tiled
from dsa_codegen.ops import indexer_paged, select
from dsa_codegen.problem.draw import Draw
from dsa_codegen.runtime import dispatch, guards, plans, torch_ops

from plans_support import HOPPER, SPLIT, Seen, gpu, paged, scores, told, without_plans
from support import H200, arguments, of_preset

pytestmark = [pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned"), pytest.mark.usefixtures("fresh_dispatch")]


@pytest.fixture(params=[True, False], ids=["guards", "no-guards"])
def guarded(request, monkeypatch):
    """With and without what torch has to compare tensors with."""
    if not request.param:
        monkeypatch.setattr(guards, "_torch_guards", None)
    return request.param


@pytest.mark.usefixtures("guarded")
def test_a_plan_allocates_nothing_until_it_runs():
    """Beside a first call that would be its results and workspaces once more: 4.5 GB of the gradient of 32K queries."""
    make = guards.allocator((1 << 60,), (1,), torch.uint8, torch.device("cpu"))
    with pytest.raises(RuntimeError):
        make()


@pytest.mark.usefixtures("guarded")
def test_what_changes_a_launch_changes_the_key(monkeypatch):
    """Each of these calls differs in one thing from one that left a plan."""
    _, kernels = gpu(monkeypatch)
    values, ends = scores()
    wide = torch.zeros(3, 600)
    table = torch.zeros(3, 8, dtype=torch.int32)
    base = {"scores": values, "ends": ends, "topk": 64, "keep_first": 0, "keep_recent": 1, "page": 64}
    changes: list[dict[str, Any]] = [
        {"scores": values[:, :499]},
        {"scores": wide[:, :500]},
        {"scores": scores(dtype=torch.bfloat16)[0]},
        {"scores": scores(2)[0], "ends": scores(2)[1]},
        {"starts": ends},
        {"topk": 128},
        {"keep_first": 1},
        {"keep_first": 1, "keep_recent": 0},
        {"page_table": table},
        {"page_table": table, "page": 32},
        {"page_table": torch.zeros(3, 9, dtype=torch.int32)[:, :8]},
    ]
    with dispatch.override(select.OP, SPLIT):
        for change in ({}, *changes):
            other = {**base, **change}
            alike = functions.select(**other)
            given = [other.get(name) for name in ("scores", "ends", "starts", "page_table")]
            wanted = told(kernels, given, alike)
            assert [told(kernels, given, functions.select(**other)) for _ in range(2)] == [wanted] * 2
    assert dispatch.stats()["select: calls"] == 3 * (1 + len(changes))


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    """What a call returns or refuses."""
    try:
        return (call().shape,)
    except (DsaError, RuntimeError, TypeError, ValueError) as error:  # the checks' and torch's
        return type(error), str(error)


@pytest.mark.usefixtures("guarded")
def test_equal_numbers_of_other_types_are_still_told_apart(monkeypatch):
    """True, 1 and 1.0 are equal, and so are their hashes; a tensor is an option like any other to torch."""
    gpu(monkeypatch)
    values, ends = scores()

    def call(options: dict[str, Any]) -> tuple[Any, ...]:
        return outcome(lambda: functions.select(values, ends, **{"topk": 64, "keep_first": 1, **options}))

    size = torch.tensor(64)
    others = [{"topk": 64.0}, {"keep_first": 1.0}, {"keep_first": True}, {"topk": [64]}, {"topk": size}, {"topk": "64"}]
    alone = [without_plans(lambda options=options: call(options)) for options in others]
    assert call({}) == (torch.Size([3, 64]),)
    assert [call(options) for options in others] == alone
    assert (InputError in [kind for kind, *_ in alone]) and len(set(alone)) > 2
    size.fill_(65)
    assert call({"topk": size}) == (torch.Size([3, 65]),)


@pytest.mark.usefixtures("guarded")
def test_bad_arguments_are_refused_before_and_after_good_ones(monkeypatch):
    _, kernels = gpu(monkeypatch)
    values, ends = scores()
    bad = [
        ((values.t().contiguous().t(), ends, 64), InputError),
        ((values, ends[:2], 64), InputError),
        ((values, ends.long(), 64), InputError),
        ((values.double(), ends, 64), InputError),
        ((values, ends, 5000), SpecError),
        ((values.to("meta"), ends, 64), InputError),
        ((values.to_sparse(), ends, 64), Exception),
    ]
    refusals: list[list[tuple[type, str]]] = [[], []]
    for refused in refusals:
        for args, kind in bad:
            with pytest.raises(kind) as error:
                functions.select(*args)
            refused.append((error.type, str(error.value)))
        for _ in range(3):
            functions.select(values, ends, 64)
    assert refusals[0] == refusals[1]
    assert len(kernels.launched) == 6 * len(dispatch._plans)


def test_no_plan_serves_an_address_that_kernels_do_not():
    aligned = torch.zeros(20)[: 4 * 4]
    for describe in (plans.taken_apart, guards.sketched):
        described = describe("any", (aligned, 3))
        assert described is not None and described[0][1:3] == ((Tensor, int), (3,))
        assert describe("any", (torch.zeros(20)[1:17], 3)) is None


def test_one_tensor_in_two_places_leaves_no_plan(monkeypatch):
    """The next call's are two, and which of them goes where nobody could tell."""
    _, kernels = gpu(monkeypatch)
    values, ends = scores()
    functions.select(values, ends, 64, starts=ends)
    assert not dispatch._plans
    kernels.launched.clear()
    starts = torch.zeros_like(ends)
    functions.select(values, ends, 64, starts=starts)
    assert any(value is starts for _, _, args in kernels.launched for value in args)


def test_a_view_of_an_input_leaves_no_plan(monkeypatch):
    """It looks like a workspace, but its contents count."""
    _, kernels = gpu(monkeypatch)
    launches = select.OP.launches

    def with_view(spec, config, inputs, outputs, gpu):
        return [
            replace(launch, args=(*launch.args, inputs["scores"][1:]))
            for launch in launches(spec, config, inputs, outputs, gpu)
        ]

    monkeypatch.setattr(select.OP, "launches", with_view)
    functions.select(*scores(), 64)
    assert kernels.launched and not dispatch._plans


@pytest.mark.usefixtures("guarded")
def test_calls_are_counted_with_and_without_plans(monkeypatch):
    gpu(monkeypatch)
    for _ in range(5):
        functions.select(*scores(), 64)
    assert len(dispatch._plans) == 1
    assert dispatch.stats() == {"select: built during a call": 1, "select: calls": 5, "select: default": 1}
    dispatch.reset()
    assert dispatch.stats() == {} and not dispatch._plans
    functions.select(*scores(), 64)
    assert dispatch.stats() == {"select: calls": 1, "select: default": 1}


@pytest.mark.usefixtures("guarded")
def test_overrides_hold_at_once_and_end_at_once(monkeypatch):
    _, kernels = gpu(monkeypatch)

    def names() -> list[str]:
        kernels.launched.clear()
        functions.select(*scores(), 64)
        return [name for name, _, _ in kernels.launched]

    usual = names()
    assert names() == names() == usual
    functions.quantize_index_k(torch.zeros(5, 128, dtype=torch.bfloat16))
    assert names() == usual == ["select_row"]
    with dispatch.override(select.OP, SPLIT):
        assert len(dispatch._plans) == 1  # that of the other operation
        assert names() == names() == names() == ["select_keep", "select_finish"]
    assert names() == names() == names() == usual


@pytest.mark.usefixtures("guarded")
def test_records_written_since_are_seen_after_a_reset(monkeypatch):
    """What ``lookup`` finds is asked for again."""
    _, kernels = gpu(monkeypatch)
    found = [SPLIT, SPLIT.replace(splits=8)]
    monkeypatch.setattr(dispatch, "lookup", lambda op, spec, sizes, gpu: dispatch.Found(found[0], "own"))
    for _ in range(3):
        functions.select(*scores(), 64)
    found.pop(0)
    functions.select(*scores(), 64)
    dispatch.reset()
    functions.select(*scores(), 64)
    assert [grid[1] for name, grid, _ in kernels.launched if name == "select_keep"] == [4, 4, 4, 4, 8]


def test_what_was_forgotten_during_a_call_leaves_no_plan(monkeypatch):
    _, kernels = gpu(monkeypatch)
    kernels.meanwhile = dispatch.reset
    functions.select(*scores(), 64)
    assert kernels.launched and not dispatch._plans


def test_plans_are_bounded_and_hold_no_tensor(monkeypatch):
    _, kernels = gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "_MOST_PLANS", 3)
    inputs, seen = paged(1), []
    gc.disable()  # memory must be free at once, not when Python looks for cycles
    try:
        for columns in (200, 201, 202, 203, 200, 200):
            logits = functions.indexer_logits_paged(**{**inputs, "max_context": columns})
            assert logits.shape[1] == columns
            values, ends = scores()
            chosen = functions.select(values, ends, 64)
            assert 1 <= len(dispatch._plans) <= 3 and len(dispatch._guarded) <= 3
            seen += map(weakref.ref, (logits, chosen, values, ends))
            seen += [weakref.ref(value) for _, _, args in kernels.launched for value in args if isinstance(value, Tensor)]
        seen += [weakref.ref(value) for value in inputs.values() if isinstance(value, Tensor)]
        kernels.launched.clear()
        del inputs, logits, values, ends, chosen
        assert len(seen) > 24 and not [each for each in seen if each() is not None]
    finally:
        gc.enable()


def test_views_for_tma_are_kept_while_a_tensor_stays_where_it_is(monkeypatch):
    _, kernels = gpu(monkeypatch)
    first, other = paged(1), paged(2)

    def views(inputs: dict[str, Any]) -> list[Tiled]:
        kernels.launched.clear()
        functions.indexer_logits_paged(**inputs)
        return [value for _, _, args in kernels.launched for value in args if isinstance(value, Tiled)]

    def offsets(inputs: dict[str, Any], of: list[Tiled]) -> list[int]:
        return [view.data_ptr() - inputs["cache"].data_ptr() for view in of]

    with dispatch.override(indexer_paged.OP, HOPPER):
        fresh = offsets(first, views(first))
        one, same, moved, back = views(first), views(first), views(other), views(first)
        (plan,) = dispatch._plans.values()
    assert len(one) == 2 and all(a is b is c for a, b, c in zip(one, same, back, strict=True))
    assert fresh == offsets(first, one) == offsets(other, moved)
    for address in range(0, 1 << 16, 16):
        assert plan.views[1].at(address).data_ptr() == address + fresh[1]
    assert len(plan.views[1]._known) <= plans.MOST_VIEWS


@pytest.mark.usefixtures("guarded")
def test_a_plan_runs_on_its_own_device(monkeypatch):
    fake, _ = gpu(monkeypatch, gpus={0: H200, 1: H200}, device=1)
    for _ in range(3):
        functions.select(*scores(), 64)
        fake.device = 0
        functions.select(*scores(), 64)
        fake.device = 1
    assert fake.entered == [1, 1, 1] and fake.current == 0
    assert len(dispatch._plans) == 2


@pytest.mark.usefixtures("guarded")
def test_many_threads_share_plans(monkeypatch):
    _, kernels = gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "_MOST_PLANS", 4)
    wrong = []

    def work(first: int) -> None:
        for step in range(100):
            values, ends = scores(1 + (first + step) % 6)
            if functions.select(values, ends, 64).shape[0] != len(ends):
                wrong.append(len(ends))
            if step % 50 == first:
                with dispatch.override(indexer_paged.OP, SPLIT):
                    pass

    workers = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and dispatch.stats()["select: calls"] == 600 == len(kernels.launched)


# The way around the operator.


@pytest.fixture
def planned(monkeypatch):
    """A call for which there is a plan."""
    gpu(monkeypatch)
    values, ends = scores()
    for _ in range(3):
        functions.select(values, ends, 64)
    assert len(dispatch._plans) == 1
    return lambda: functions.select(values, ends, 64)


@pytest.fixture
def operators(monkeypatch):
    """Which operators of this package torch ran."""
    called: list[str] = []
    call = dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda op, *args: (called.append(op.function), call(op, *args))[1])
    return called


def test_a_planned_call_does_not_need_the_operator(planned, operators):
    planned()
    with torch.inference_mode():
        assert planned().is_inference()
    assert operators == []


@pytest.mark.usefixtures("guarded")
def test_whatever_watches_operators_sees_this_one(planned, operators):
    with Seen() as seen:
        planned()
    assert "dsa_codegen.select.default" in seen.names
    with torch.overrides.BaseTorchFunctionMode():
        planned()
    with torch.profiler.profile() as profiled:
        planned()
    assert "dsa_codegen::select" in [event.key for event in profiled.key_averages()]
    assert operators == ["select"] * 3


@pytest.mark.usefixtures("guarded")
def test_gradients_see_the_operator(monkeypatch, operators):
    gpu(monkeypatch)
    q, kv = torch.zeros(2, 1, 512, dtype=torch.bfloat16), torch.zeros(9, 1, 512, dtype=torch.bfloat16)
    args = q, kv, torch.zeros(2, 1, 64, dtype=torch.int32), 1.0
    sink = torch.nn.Parameter(torch.zeros(1))
    with torch.no_grad():
        functions.sparse_attention(*args, sink=sink)
        functions.sparse_attention(*args, sink=sink)
    assert operators == ["sparse_attention"]
    with pytest.raises(InputError, match=r"^sink: got a tensor that requires a gradient"):
        functions.sparse_attention(*args, sink=sink)
    functions.sparse_attention(*args, sink=sink.detach())
    assert operators == ["sparse_attention"]


def test_fake_tensors_and_transforms_go_to_the_operator(planned):
    with FakeTensorMode() as mode:
        values, ends = (mode.from_tensor(each) for each in scores())
        chosen = functions.select(values, ends, 64)
    assert type(chosen).__name__ == "FakeTensor" and tuple(chosen.shape) == (3, 64)
    values, ends = scores()
    batched = torch.func.functionalize(lambda each: functions.select(each, ends, 64))(values)
    assert type(batched) is Tensor and tuple(batched.shape) == (3, 64)


def test_compiled_calls_trace_the_operator(planned):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda values, ends: functions.select(values, ends, 64), backend=backend, fullgraph=True)(*scores())
    (graph,) = graphs
    assert torch_ops.function("select") in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("op", ops.all_ops().values(), ids=lambda op: op.name)
def test_cpu_tensors_go_to_the_reference_every_time(op):
    spec = of_preset(op)[-1]
    args = arguments(op, spec, op.inputs(spec, op.cases(spec)[0], Draw(3)))
    for _ in range(3):
        torch_ops.direct(op.function)(*args)
    assert dispatch.stats() == {f"{op.name}: reference": 3}
    assert not dispatch._plans
