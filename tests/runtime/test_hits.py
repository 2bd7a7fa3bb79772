"""Hits in C: the driver is told what it would have been told by Python, and every call that Python would refuse goes there."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_codegen import functions, ops
from dsa_codegen.errors import InputError
from dsa_codegen.kernels.backends import driver
from dsa_codegen.ops import indexer_paged, select
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Config
from dsa_codegen.runtime import compiled, dispatch, guards, hits, plans, torch_ops

from fake_driver import STREAM, FakeDriver, driven_gpu
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
    function, served = torch_ops.direct(op.function), 0
    with dispatch.override(op, config):
        for case in [op.within_reach(spec, config, case) for case in op.cases(spec)]:
            first, other = (arguments(op, spec, op.inputs(spec, case, Draw(seed))) for seed in (1, 2))
            for _ in range(3):  # by the operator, by the plan's key, by its guard
                function(*first)
            fake.launched.clear()
            asked = len(by_python)
            in_c = told(fake, other, function(*other))
            served += len(by_python) == asked
            with monkeypatch.context() as patch:
                patch.setattr(hits.Form, "learn", lambda *args: None)
                hits.forget(op.name)
                in_python = told(fake, other, function(*other))
            assert in_c == in_python
    assert served
