"""What goes wrong around a hit in C: a thread without a context, a launch that the driver refuses, memory that is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsa_codegen import functions
from dsa_codegen.kernels.backends import driver
from dsa_codegen.ops import select
from dsa_codegen.runtime import dispatch, plans

from plans_support import OF_HITS, SPLIT, scores

pytestmark = OF_HITS


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
