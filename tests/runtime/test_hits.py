"""Hits in C: the driver is told what it would have been told by Python, and results are the same."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_codegen import ops
from dsa_codegen.ops import select
from dsa_codegen.problem.draw import Draw
from dsa_codegen.runtime import dispatch, hits, torch_ops

from fake_driver import FakeDriver, driven_gpu
from plans_support import OF_HITS, SPLIT
from support import H200, arguments, of_preset

pytestmark = OF_HITS


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
