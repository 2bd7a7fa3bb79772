"""Which calls C serves: those that look like one that Python served, as long as nothing asks to see or change them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_codegen import functions
from dsa_codegen.errors import InputError
from dsa_codegen.ops import indexer_paged, select
from dsa_codegen.runtime import dispatch, guards, hits, torch_ops

from fake_driver import STREAM, driven_gpu
from plans_support import HOPPER, OF_HITS, SPLIT, Seen, scores
from support import H200

pytestmark = OF_HITS


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


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_sees_the_operator(known, strict):
    class Selects(torch.nn.Module):
        def forward(self, values: Tensor, ends: Tensor) -> Tensor:
            return functions.select(values, ends, 64)

    exported = torch.export.export(Selects(), scores(), strict=strict)
    assert torch_ops.function("select") in [node.target for node in exported.graph.nodes]


def test_lists_in_int64_are_narrowed_before(fake, by_python):
    q, kv = torch.zeros(2, 1, 512, dtype=torch.bfloat16), torch.zeros(9, 1, 512, dtype=torch.bfloat16)
    wide = torch.arange(128).view(2, 1, 64)
    for _ in range(4):
        functions.sparse_attention(q, kv, wide, 1.0)
    assert len(by_python) == 2 and not any(wide.data_ptr() in launched.addresses() for launched in fake.launched)
    functions.sparse_attention(q, kv, wide.int(), 1.0)
    assert len(by_python) == 2
    for wrong in (None, [1], wide.float()):
        with pytest.raises(InputError, match=r"^indices: "):
            functions.sparse_attention(q, kv, wrong, 1.0)


def test_the_sms_may_be_left_out(fake, by_python):
    values, ends = scores()
    select_ = torch_ops.direct("select")
    for sms in ((), (None,), ()):
        for _ in range(3):
            select_(values, ends, 64, None, None, 64, 0, 0, *sms)
    assert len(by_python) == 2


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
