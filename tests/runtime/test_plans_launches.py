"""Plans of every operation and backend: they launch what the call would have launched without them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from torch import Tensor

from dsa_codegen import ops
from dsa_codegen.errors import NoConfig
from dsa_codegen.kernels.tma import Tiled
from dsa_codegen.ops import select
from dsa_codegen.ops.attention import AttentionSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config, Op
from dsa_codegen.problem.values import Spec
from dsa_codegen.runtime import dispatch, torch_ops

from plans_support import SPLIT, Seen, gpu, told, without_plans
from support import H200, arguments, of_preset

pytestmark = [pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned"), pytest.mark.usefixtures("fresh_dispatch")]


SHARED = AttentionSpec(8, 576, 64, lengths=True, share=4)  # two launches, with workspaces between them


def problems() -> list[Any]:
    """Every operation with its options, each with the configs by judgement of all its backends, and one that splits rows."""
    found = []
    for op in ops.all_ops().values():
        models = ("glm-5", "deepseek-v3.2") if op.name == "attention" else ("glm-5",)  # clusters are for 128 heads
        bases = [base for name in models for base in of_preset(op, name)]
        specs = [other for base in bases for other in op.options(base)] + ([SHARED] if op.name == "attention" else [])
        for spec in dict.fromkeys(specs):
            guesses = [config for case in op.cases(spec) for config in op.guesses(spec, case.sizes, H200)]
            for backend in op.backends:
                with contextlib.suppress(NoConfig):  # this template does not serve the spec; another backend's does
                    guesses.append(op.seed_config(spec, backend, H200))
            guesses += [SPLIT] if op is select.OP else []
            fitting = [config for config in dict.fromkeys(guesses) if not op.violations(spec, config, H200)]
            first = {
                (config.backend, config.to_dict().get("scheme"), config.to_dict().get("splits")): config for config in fitting
            }
            found += [pytest.param(op, spec, config, id=f"{op.name}-{spec.id}-{config}") for config in first.values()]
    return found


PROBLEMS = problems()


def sizes_of(op: Op, spec: Spec, config: Config) -> list[Case]:
    """A case of each size: launches know nothing of what tensors hold."""
    cases = [op.within_reach(spec, config, case) for case in op.cases(spec)]
    return [*{case.sizes: case for case in cases}.values()]


def test_every_operation_and_backend_is_among_the_problems():
    listed = {(param.values[0].name, param.values[2].backend) for param in PROBLEMS}
    assert listed == {(op.name, backend) for op in ops.all_ops().values() for backend in op.backends}


@pytest.mark.parametrize(("op", "spec", "config"), PROBLEMS)
def test_a_plan_launches_what_the_call_would_have(op, spec, config, monkeypatch):
    _, kernels = gpu(monkeypatch)
    function = torch_ops.direct(op.function)
    with dispatch.override(op, config):
        for case in sizes_of(op, spec, config):
            first, other = (arguments(op, spec, op.inputs(spec, case, Draw(seed))) for seed in (1, 2))
            without_plans(lambda args=first: function(*args))
            kernels.launched.clear()
            before = len(dispatch._plans)
            replayed = [told(kernels, other, function(*other)) for _ in range(2)]  # by the plan's key, then by its guard
            assert len(dispatch._plans) == before  # it was served by a plan, or leaves none
            assert len(dispatch._guarded) == before
            alone = told(kernels, other, without_plans(lambda args=other: function(*args)))
            assert replayed == [alone, alone]


@pytest.mark.parametrize(("op", "spec", "config"), PROBLEMS)
def test_kernels_that_take_addresses_get_those_of_the_same_tensors(op, spec, config, monkeypatch):
    _, kernels = gpu(monkeypatch, takes_addresses=True)
    function = torch_ops.direct(op.function)
    with dispatch.override(op, config):
        for case in sizes_of(op, spec, config):
            args = arguments(op, spec, op.inputs(spec, case, Draw(1)))
            without_plans(lambda args=args: function(*args))
            wanted = [*kernels.launched]
            kernels.launched.clear()
            result = function(*args)
            results = [result] if isinstance(result, Tensor) else list(result or ())
            own = [each for each in args if isinstance(each, Tensor)]
            workspaces: dict[int, int] = {}
            for (kernel, grid, values), (name, shape, addresses) in zip(wanted, kernels.launched, strict=True):
                assert (kernel, grid) == (name, shape)
                for value, address in zip(values, addresses, strict=True):
                    assert not isinstance(address, Tensor)
                    if not isinstance(value, Tensor):
                        assert isinstance(value, Tiled) or repr(address) == repr(value)  # NaN too
                    elif any(value is each for each in own):
                        assert address == value.data_ptr()
                    elif address not in [each.data_ptr() for each in results]:
                        assert address % 16 == 0
                        assert workspaces.setdefault(id(value), address) == address
            kernels.launched.clear()


@pytest.mark.parametrize(("op", "spec", "config"), PROBLEMS)
def test_launches_come_without_work_of_torch(op, spec, config):
    """A plan repeats launches and allocations, nothing else: whatever torch did besides would be lost."""
    for case in sizes_of(op, spec, config):
        inputs = op.inputs(spec, case, Draw(1))
        outputs = op.allocate(spec, inputs)
        with Seen() as seen:
            launches = op.launches(spec, config, inputs, outputs, H200)
        if launches:
            assert set(seen.names) <= {"aten.empty.memory_format", "aten.new_empty.default"}
