"""What hits in C keep: memory between two launches and descriptors of tensors, and nothing of a call."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_codegen import functions
from dsa_codegen.ops import indexer_paged, select
from dsa_codegen.runtime import dispatch, hits, plans

from fake_driver import STREAM
from plans_support import HOPPER, OF_HITS, SPLIT, paged, scores

pytestmark = OF_HITS


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
