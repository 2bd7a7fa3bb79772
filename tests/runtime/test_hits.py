"""Hits in C: the driver is told what it would have been told by Python, and every call that Python would refuse goes there."""

from __future__ import annotations

import functools
import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_driver import STREAM, FakeDriver, driven_gpu
from torch import Tensor

from dsa_codegen import functions, ops
from dsa_codegen.errors import InputError
from dsa_codegen.kernels.backends import driver
from dsa_codegen.ops import indexer_paged, select
from dsa_codegen.problem.draw import Draw
from dsa_codegen.runtime import dispatch, guards, hits, plans, torch_ops

from plans_support import HOPPER, SPLIT, Seen, paged, scores
from support import H200, arguments, of_preset

pytestmark = [
    pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned"),
    pytest.mark.usefixtures("fresh_dispatch"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler"),
]


@pytest.fixture
def by_python(monkeypatch):
    """How many calls Python served, or was asked to."""
    asked: list[str] = []
    call_again = dispatch.call_again

    def counted(op, *rest):
        asked.append(op.name)
        return call_again(op, *rest)

    monkeypatch.setattr(dispatch, "call_again", counted)
    return asked


def problems() -> list[Any]:
    """Every operation by every language that is launched by the driver, and some with several launches."""
    found: dict[Any, Any] = {}
    for op in ops.all_ops().values():
        for spec in of_preset(op, "glm-5"):
            for case in op.cases(spec):
                for config in op.guesses(spec, case.sizes, H200):
                    if config.backend != "tilelang" and not op.violations(spec, config, H200):
                        parts = config.to_dict().get("splits", 1) != 1
                        found.setdefault((op.name, config.backend, parts), (op, spec, config))
    found["split"] = select.OP, of_preset(select.OP, "glm-5")[0], SPLIT
    return [pytest.param(*each, id=f"{each[0].name}-{each[2]}") for each in found.values()]


def told(fake: FakeDriver, args: list[Any], result: Any) -> tuple[Any, ...]:
    """What the driver was told since the last look, and what the results look like."""
    results = [result] if isinstance(result, Tensor) else list(result or ())
    given = [each for each in args if isinstance(each, Tensor)]
    names = {each.data_ptr(): f"result {place}" for place, each in enumerate(results) if each.numel()}
    names |= {each.data_ptr(): f"argument {place}" for place, each in enumerate(given) if each.numel()}
    rooms = [address for each in fake.launched for address in each.addresses() if address not in names]
    launched = [each.named(names, *rooms[:1] or (0,)) for each in fake.launched]
    fake.launched.clear()
    looks = [(each.shape, each.stride(), each.dtype, each.untyped_storage().nbytes()) for each in results]
    return type(result), launched, looks


@pytest.mark.parametrize(("op", "spec", "config"), problems())
def test_the_driver_is_told_the_same(op, spec, config, monkeypatch, by_python):
    """By C and by the plan in Python, for other tensors than those of the first call."""
    _, fake = driven_gpu(monkeypatch)
    function = torch_ops.direct(op.function)
    case = op.within_reach(spec, config, op.cases(spec)[0])
    first, other = (arguments(op, spec, op.inputs(spec, case, Draw(seed))) for seed in (1, 2))
    with dispatch.override(op, config):
        for _ in range(2):  # by the operator, by the plan's key
            function(*first)
        fake.launched.clear()
        asked = len(by_python)
        in_c = told(fake, other, function(*other))
        assert len(by_python) == asked and in_c[1]
        monkeypatch.setattr(hits.Form, "learn", lambda *args: None)
        hits.forget(op.name)
        assert in_c == told(fake, other, function(*other))
        assert len(by_python) > asked


# Around a call that C serves.


@pytest.fixture
def fake(monkeypatch):
    """The driver of a GPU that is not there."""
    return driven_gpu(monkeypatch)[1]


@pytest.fixture
def known(fake, by_python):
    """A call that C serves."""
    values, ends = scores()
    for _ in range(3):
        functions.select(values, ends, 64)
    by_python.clear()
    fake.launched.clear()
    functions.select(values, ends, 64)
    assert not by_python and len(fake.launched) == 1
    fake.launched.clear()
    return lambda: functions.select(values, ends, 64)


def test_calls_are_counted(known):
    before = dispatch.stats()
    for _ in range(5):
        known()
    assert dispatch.stats() == {**before, "select: calls": before["select: calls"] + 5}


def test_results_are_new_and_as_python_makes_them(known):
    first, second = known(), known()
    assert first.shape == (3, 64) and first.dtype == torch.int32 and first.data_ptr() != second.data_ptr()
    with torch.inference_mode():
        assert known().is_inference()


def test_what_is_not_the_same_goes_to_python(known, by_python):
    values, ends = scores()
    spare = torch.zeros(3 * 500 + 1)
    others: list[Callable[[], Any]] = [
        lambda: functions.select(values[:, :499], ends, 64),
        lambda: functions.select(values.to(torch.bfloat16), ends, 64),
        lambda: functions.select(*scores(2), 64),
        lambda: functions.select(values, ends, 65),
        lambda: functions.select(values, ends, 64, keep_first=1),
        lambda: functions.select(values, ends, 64, starts=torch.zeros_like(ends)),
        lambda: functions.select(values, ends, 64, sms=40),
        lambda: functions.select(values, ends, 64, out=torch.zeros(3, 64, dtype=torch.int32)),
        lambda: functions.select(torch.nn.Parameter(values, False), ends, 64),
    ]
    for number, other in enumerate(others):
        other()
        assert len(by_python) == number + 1
    for wrong in (64.0, "64", [64]):
        with pytest.raises(InputError, match=r"^topk: "):
            functions.select(values, ends, wrong)
    by_python.clear()
    for _ in range(3):
        functions.select(spare[1:].view(3, 500), ends, 64)  # an address that no plan is for
    assert len(by_python) == 3
    by_python.clear()
    for _ in range(3):
        for other in others:
            other()
    assert len(by_python) == len(others) - 1  # by the plan's key, which parameters share with tensors; then no more
    known()


def test_as_many_calls_are_known_as_there_is_room_for(known, by_python, fake):
    shapes = [scores(rows) for rows in range(4, 24)]
    for values, ends in 3 * shapes:
        assert len(functions.select(values, ends, 64)) == len(ends)
    by_python.clear()
    fake.launched.clear()
    for values, ends in shapes[-16:]:
        functions.select(values, ends, 64)
    assert not by_python
    known()
    known()
    assert by_python == ["select"]
    for values, ends in shapes[-15:]:
        functions.select(values, ends, 64)
    assert by_python == ["select"] and len(fake.launched) == 16 + 2 + 15


def test_results_go_where_the_caller_wants_them(fake, by_python):
    values, ends = scores()
    out = torch.zeros(3, 64, dtype=torch.int32)
    for _ in range(4):
        assert functions.select(values, ends, 64, out=out) is out
    assert len(by_python) == 2
    (address,) = [place for place in fake.launched[-1].addresses() if place not in (values.data_ptr(), ends.data_ptr())]
    assert address == out.data_ptr()


def test_launches_know_the_sms(fake, by_python):
    values, ends = scores(40)
    with dispatch.override(select.OP, SPLIT.replace(scheme="row", splits=1)):
        for sms in (None, 9, 2):
            for _ in range(4):
                functions.select(values, ends, 64, sms=sms)
    assert [each.shape[0] for each in fake.launched] == [40] * 4 + [36] * 4 + [8] * 4
    assert len(by_python) == 6


def test_what_looks_at_operators_sees_them(known, by_python):
    with Seen() as seen:
        known()
    assert "dsa_codegen.select.default" in seen.names
    names: list[str] = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    with Functions():
        known()
    assert [name for name in names if "select" in name] and "data_ptr" not in names[:1]
    with torch.profiler.profile() as profiled:
        known()
    assert "dsa_codegen::select" in [event.key for event in profiled.key_averages()]
    values, ends = scores()
    assert type(torch.func.functionalize(lambda each: functions.select(each, ends, 64))(values)) is Tensor
    by_python.clear()
    known()
    assert not by_python


def test_a_trace_sees_the_operator(known):
    graphs = []
    torch._dynamo.reset()
    torch.compile(
        lambda values, ends: functions.select(values, ends, 64),
        backend=lambda graph, example: (graphs.append(graph), graph)[1],
        fullgraph=True,
    )(*scores())
    assert torch_ops.function("select") in [node.target for graph in graphs for node in graph.graph.nodes]


def test_gradients_are_refused(fake, by_python):
    q, kv = torch.zeros(2, 1, 512, dtype=torch.bfloat16), torch.zeros(9, 1, 512, dtype=torch.bfloat16)
    args = q, kv, torch.zeros(2, 1, 64, dtype=torch.int32), 1.0
    sink = torch.nn.Parameter(torch.zeros(1))
    with torch.no_grad():
        for _ in range(4):
            functions.sparse_attention(*args, sink=sink)
    assert len(by_python) == 2
    with pytest.raises(InputError, match=r"^sink: got a tensor that requires a gradient"):
        functions.sparse_attention(*args, sink=sink)
    with torch.no_grad():
        functions.sparse_attention(*args, sink=sink)
    assert len(by_python) == 3


def test_overrides_and_resets_hold_at_once(known, fake, by_python):
    def kernels() -> int:
        fake.launched.clear()
        known()
        return len(fake.launched)

    with dispatch.override(indexer_paged.OP, HOPPER):
        assert kernels() == 1 and not by_python  # another operation's
    with dispatch.override(select.OP, SPLIT):
        assert [kernels() for _ in range(4)] == [2] * 4
    assert kernels() == 1
    by_python.clear()
    dispatch.reset()
    assert dispatch.stats() == {} and kernels() == 1 and by_python == ["select"]


def test_a_call_on_another_device_goes_to_python(monkeypatch, by_python):
    gpu, fake = driven_gpu(monkeypatch, gpus={0: H200, 1: H200}, device=1)
    gpu.current = 1
    values, ends = scores()
    for _ in range(4):
        functions.select(values, ends, 64)
    assert len(by_python) == 2 and fake.launched[-1].shape[-1] == STREAM + 1
    gpu.current = 0
    for _ in range(2):
        functions.select(values, ends, 64)
    assert len(by_python) == 4 and gpu.entered == [1, 1] and fake.launched[-1].shape[-1] == STREAM + 1


def test_a_thread_without_a_context_enters_the_device(known, fake):
    fake.answers += [driver.INVALID_CONTEXT]
    known()
    assert fake.entered == 1 and len(fake.launched) == 2 and fake.launched[0] == fake.launched[1]


def test_what_the_driver_refuses_is_raised(fake, monkeypatch):
    with dispatch.override(select.OP, SPLIT):
        values, ends = scores()
        for _ in range(4):
            functions.select(values, ends, 64)
        fake.launched.clear()
        fake.answers += [0, driver.INVALID_CONTEXT, 0]
        functions.select(values, ends, 64)
        first, second, third = fake.launched
        assert first.function != second.function and second == third
        for codes in ([701], [0, 701], [driver.INVALID_CONTEXT, driver.INVALID_CONTEXT]):
            fake.answers += codes
            with pytest.raises(RuntimeError, match=rf"to launch select_\w+ with a grid of .*\({codes[-1]}\)"):
                functions.select(values, ends, 64)
            assert not fake.answers
        functions.select(values, ends, 64)


def test_what_an_allocation_raises_is_raised(monkeypatch, fake, by_python):
    empty: list[Exception] = []

    def maker(tensor: Tensor) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if empty:
                raise empty.pop()
            return torch.empty_like(tensor)

        return make

    monkeypatch.setattr(plans, "_maker", maker)
    values, ends = scores()
    for _ in range(4):
        functions.select(values, ends, 64)
    launched = len(fake.launched)
    for error in (torch.OutOfMemoryError("all of it"), RuntimeError("the allocator"), MemoryError()):
        empty.append(error)
        with pytest.raises(type(error)):
            functions.select(values, ends, 64)
    assert len(by_python) == 2 and len(fake.launched) == launched
    functions.select(values, ends, 64)


@pytest.fixture
def split(fake):
    """A call of two launches with memory between them, for so many rows; tells where that memory was."""

    def call(rows: int = 3) -> int:
        values, ends = scores(rows)
        before = len(fake.launched)
        chosen = functions.select(values, ends, 64)
        own = {each.data_ptr() for each in (values, ends, chosen)}
        first, second = ([each for each in launched.addresses() if each not in own] for launched in fake.launched[before:])
        assert first[0] == second[0]
        return first[0]

    with dispatch.override(select.OP, SPLIT):
        for rows in (3, 3, 3, 40, 40, 40):
            call(rows)
        yield call


def test_a_stream_keeps_the_memory_between_launches(split, fake, by_python, monkeypatch):
    """The largest that it needed; another stream has another."""
    place = split(40)
    assert [split(rows) for rows in (40, 3, 40, 3)] == [place] * 4 and not by_python
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + 1, raising=False)
    dispatch._plans.clear()  # plans ask for the stream as they were told to
    dispatch._guarded.clear()
    hits.forget("select")
    other = [split(rows) for rows in (3, 3, 40, 40, 40)][-1]
    assert other != place and split(3) == split(40) == other


def test_a_call_during_another_has_memory_of_its_own(split, fake):
    """As one of another thread on the same stream, between two launches."""
    places: list[int] = []
    launched: list[int] = []

    def meanwhile() -> None:
        launched.append(1)
        if len(launched) == 1:
            values, ends = scores(40)
            functions.select(values, ends, 64)
            places.extend(fake.launched[-1].addresses())

    usual = split(40)
    fake.launched.clear()
    fake.meanwhile = meanwhile
    values, ends = scores(40)
    functions.select(values, ends, 64)
    fake.meanwhile = lambda: None
    assert len(launched) == 4 and usual in fake.launched[0].addresses() and usual in fake.launched[3].addresses()
    assert usual not in places and split(40) in (usual, *places)


@pytest.mark.parametrize("way", ["capturing", "refuses"])
def test_a_graph_has_memory_of_its_own(split, fake, way):
    place = split(40)
    setattr(fake, way, 1)
    fresh = split(40)
    assert fresh != place
    setattr(fake, way, 0)
    assert split(40) == place


def test_what_is_large_is_not_kept_nor_what_was_forgotten(split, monkeypatch):
    kept: list[weakref.ref] = []
    make = plans.guards.allocator

    def allocator(shape, stride, dtype, device):
        inner = make(shape, stride, dtype, device)

        def made() -> Tensor:
            tensor = inner()
            kept.append(weakref.ref(tensor))
            return tensor

        return made if dtype == torch.uint8 else inner

    monkeypatch.setattr(plans.guards, "allocator", allocator)
    split(40)
    hits.forget()
    dispatch._plans.clear()
    dispatch._guarded.clear()
    for rows, left in ((40, 1), (400, 1), (40000, 1)):
        for _ in range(4):
            split(rows)
        assert sum(each() is not None for each in kept) == left
    assert len(kept) > 6
    dispatch.reset()
    assert not [each for each in kept if each() is not None]


def test_descriptors_are_kept_while_a_tensor_stays_where_it_is(monkeypatch, fake, by_python):
    encoded: list[int] = []
    encode = fake.cuTensorMapEncodeTiled
    monkeypatch.setattr(fake, "cuTensorMapEncodeTiled", lambda *args: (encoded.append(args[3].value), encode(*args))[1])
    monkeypatch.setattr(plans, "MOST_VIEWS", 4)
    inputs = [paged(seed) for seed in range(6)]

    def maps(given: dict[str, Any]) -> list[int]:
        fake.launched.clear()
        functions.indexer_logits_paged(**given)
        ((launched, kinds),) = [(each.values, each.kinds) for each in fake.launched]
        return [int.from_bytes(value[:8], "little") for value, kind in zip(launched, kinds, strict=True) if kind == "map"]

    with dispatch.override(indexer_paged.OP, HOPPER):
        for _ in range(4):
            wanted = maps(inputs[0])
        assert len(by_python) == 2 and len(wanted) == 2 and wanted[0] == inputs[0]["cache"].data_ptr()
        apart = wanted[1] - wanted[0]
        for fresh in (0, 2, 2, 2, 2, 2):
            for given in inputs:
                encoded.clear()
                place = given["cache"].data_ptr()
                assert maps(given) == [place, place + apart]
                assert len(encoded) <= max(fresh, 2)
        encoded.clear()
        assert maps(inputs[-1]) == maps(inputs[-1]) and not encoded
    assert len(by_python) == 2


def test_nothing_is_kept_of_a_call(known, by_python):
    seen: list[Any] = []
    gc.disable()  # memory must be free at once, not when Python looks for cycles
    try:
        for _ in range(4):
            values, ends = scores()
            chosen = functions.select(values, ends, 64)
            seen += map(weakref.ref, (values, ends, chosen))
        del values, ends, chosen
        assert not by_python and not [each for each in seen if each() is not None]
        (plan,) = dispatch._plans.values()
        left = weakref.ref(plan)
        dispatch.reset()
        del plan
        assert left() is None
    finally:
        gc.enable()


def test_many_threads_share_hits(fake):
    wrong: list[int] = []

    def work(first: int) -> None:
        for step in range(60):
            values, ends = scores(1 + (first + step) % 6)
            if functions.select(values, ends, 64).shape[0] != len(ends):
                wrong.append(len(ends))
            if step % 20 == first:
                hits.forget()

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and dispatch.stats()["select: calls"] == 240


def test_without_torchs_guard_calls_stay_in_python(fake, by_python, monkeypatch):
    monkeypatch.setattr(guards, "_torch_guards", None)
    values, ends = scores()
    for _ in range(5):
        functions.select(values, ends, 64)
    assert len(by_python) == 5


def calls_on_a_gpu() -> dict[str, Callable[[], Any]]:
    """Public functions by kernels in CUDA C++, Triton and Gluon, of one launch and of two."""
    found = {}
    for name in ("select", "indexer", "indexer_paged", "attention", "attention_paged", "quantize_paged"):
        op = ops.get(name)
        spec = of_preset(op, "glm-5")[0]
        spec = replace(spec, clean=True) if hasattr(spec, "clean") else spec  # else memory beside windows stays as it was
        args = arguments(op, spec, op.inputs(spec, op.cases(spec)[0], Draw(1, "cuda")))
        found[name] = functools.partial(torch_ops.direct(op.function), *args)
    return found


@pytest.mark.gpu
def test_on_a_gpu_results_are_pythons(by_python, monkeypatch):
    """On another stream, from another thread and in a graph, too."""

    def outputs(call: Callable[[], Any]) -> list[Tensor]:
        result = call()
        return [result] if isinstance(result, Tensor) else list(result or ())

    for name, call in calls_on_a_gpu().items():
        wanted = [each.clone() for each in outputs(call)]
        outputs(call)
        by_python.clear()
        found = [outputs(call)]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(outputs(call))
        torch.cuda.synchronize()
        thread = threading.Thread(target=lambda call=call, found=found: found.append(outputs(call)))
        thread.start()
        thread.join()
        with torch.cuda.graph(graph):
            found.append(outputs(call))
        for each in found[-1]:
            each.view(torch.uint8).fill_(255)
        graph.replay()
        torch.cuda.synchronize()
        assert not by_python or name == "select", name  # of select TileLang may serve
        for each in found:
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(wanted, each, strict=True)), name
