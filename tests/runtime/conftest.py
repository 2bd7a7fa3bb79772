"""What tests of hits share: the driver of a GPU that is not there, and the calls that Python was asked to serve."""

from __future__ import annotations

import pytest

from dsa_codegen import functions
from dsa_codegen.runtime import dispatch

from fake_driver import driven_gpu
from plans_support import scores


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
