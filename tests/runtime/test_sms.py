"""``sms``: grids leave SMs free where blocks stay, calls with and without are told apart, traces carry it."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import functions, ops
from dsa_codegen.errors import InputError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.runtime import dispatch, torch_ops

from paged_designs import CLUSTERS
from plans_support import Seen, gpu
from support import arguments, of_preset

H100 = resolve("H100")
BUDGETED = {op.name: op for op in ops.all_ops().values() if op.budgeted}
V32 = presets.preset("deepseek-v3.2")


def guessed(name, backend, **sizes):
    """The first config by judgement of a backend, which staying blocks may be a choice of."""
    op = ops.get(name)
    spec = op.specs(V32)[0]
    sizes = op.sizes_type.from_dict({**op.workloads(spec)[0].sizes.to_dict(), **sizes})
    return op.default_config(spec, sizes, H100, backend)


STAYING = {
    # operation and backend: config, sizes, blocks on each SM
    "indexer_paged-gluon": (
        Config.of("gluon", part_queries=1, block_n=64, num_stages=2, accumulators=1, blocks_per_sm=4, gathered=1),
        {"batch": 64, "context": 65536},
        4,
    ),
    "indexer_paged-triton": (
        Config.of("triton", schedule="persistent", block_n=64, block_q=1, num_warps=4, num_stages=4, blocks_per_sm=4),
        {"batch": 64, "context": 65536},
        4,
    ),
    "attention-cuda": (guessed("attention", "cuda"), {"queries": 4096, "tokens": 8192}, 1),
    "attention_paged-cuda": (
        CLUSTERS,
        {"batch": 4096},
        1,
    ),
    "select-cuda": (guessed("select", "cuda", rows=4096, columns=32768), {"rows": 4096, "columns": 32768}, 2),
    "select-cuda-long": (guessed("select", "cuda", rows=4096, columns=131072), {"rows": 4096, "columns": 131072}, 1),
    "select-triton": (
        Config.of("triton", scheme="row", capacity=4096, block_n=4096, num_warps=8, sample=2048, splits=1),
        {"rows": 4096, "columns": 8192},
        4,
    ),
}


def blocks(op, config, sizes, sms=None):
    """Blocks of the first launch whose blocks stay, on shapes alone; lists are sorted before by many that do not."""
    spec = op.specs(V32)[0]
    inputs = op.inputs(spec, Case(op.sizes_type.from_dict({**op.workloads(spec)[0].sizes.to_dict(), **sizes})), Draw(0, "meta"))
    variant = Variant(op, spec, config, H100, {})
    variant = variant if sms is None else variant.within(sms)
    launches = op.launches(spec, config, inputs, op.allocate(spec, inputs), variant.gpu)
    x, y, z = next(launch.grid for launch in launches if launch.kernel != "sort")
    return x * y * z


@pytest.mark.parametrize("name", STAYING)
def test_blocks_that_stay_leave_the_other_sms_free(name):
    config, sizes, per_sm = STAYING[name]
    op = ops.get(name.split("-")[0])
    whole = blocks(op, config, sizes)
    for sms in (1, 2, 100, 116, 131):
        assert blocks(op, config, sizes, sms) <= max(per_sm * sms, 2)  # a cluster of attention has two
    assert blocks(op, config, sizes, 116) >= 0.9 * per_sm * 116  # the paged indexer's groups are equal
    assert blocks(op, config, sizes, 1000) == whole


@pytest.mark.parametrize("name", BUDGETED)
def test_one_sm_is_enough_to_launch(name):
    """Every template's default, whatever its grid is made of."""
    op, launches = BUDGETED[name], []
    for spec in op.options(of_preset(op)[-1])[:2]:
        for case in op.cases(spec):
            config = op.default_config(spec, case.sizes, H100)
            case = op.within_reach(spec, config, case)
            inputs = op.inputs(spec, case, Draw(0))
            one = Variant(op, spec, config, H100, {}).within(1).gpu
            launches += op.launches(spec, config, inputs, op.allocate(spec, inputs), one)
    assert launches and all(min(launch.grid) >= 1 for launch in launches)


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
@pytest.mark.usefixtures("fresh_dispatch")
def test_plans_of_calls_with_and_without_are_two(monkeypatch):
    """The same arguments, and a call behind another's plan launches what it would have launched first."""
    config, *_ = STAYING["select-triton"]
    _, kernels = gpu(monkeypatch)
    scores, ends = torch.zeros(2000, 500), torch.full((2000,), 500, dtype=torch.int32)
    out = torch.empty(2000, 64, dtype=torch.int32)
    with dispatch.override(ops.get("select"), config):
        for _ in range(3):
            for sms in (None, 100, 7):
                functions.select(scores, ends, 64, sms=sms)
                functions.select(scores, ends, 64, sms=sms, out=out)
        assert len(dispatch._plans) == 6
    grids = [grid[0] for _, grid, _ in kernels.launched]
    assert grids == [528, 528, 400, 400, 28, 28] * 3


def test_results_do_not_change_and_nonsense_is_named():
    scores, ends = Draw(1).normal(3, 300), torch.tensor([300, 7, 0], dtype=torch.int32)
    assert torch.equal(dsa.select(scores, ends, 64), dsa.select(scores, ends, 64, sms=5))
    for sms in (0, -3, "many", 1.5, True):
        with pytest.raises(InputError, match=r"^sms:"):
            dsa.select(scores, ends, 64, sms=sms)


def test_a_trace_carries_it():
    scores, ends = Draw(1).normal(3, 300), torch.full((3,), 300, dtype=torch.int32)
    seen = []
    original = dispatch.call

    def watched(op, args, sms=None):
        seen.append(sms)
        return original(op, args, sms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "call", watched)
        traced = torch.compile(lambda *args: dsa.select(*args, 64, sms=9), backend="aot_eager", fullgraph=True)
        assert torch.equal(traced(scores, ends), dsa.select(scores, ends, 64))
    assert 9 in seen


def test_only_operations_whose_grids_ask_for_sms_take_it():
    assert set(BUDGETED) == {"attention", "attention_paged", "indexer", "indexer_paged", "select"}
    for name, (op, form) in torch_ops._BY_FUNCTION.items():
        assert ("int? sms=None" in form) == op.budgeted, name


def test_who_watches_operators_sees_the_call():
    scores, ends = torch.zeros(2, 100), torch.full((2,), 100, dtype=torch.int32)
    with Seen() as seen:
        dsa.select(scores, ends, 64, sms=3)
    assert seen.names == ["dsa_codegen.select.default"]


SMALL = {
    "attention": {"queries": 200, "tokens": 3000},
    "attention_paged": {"batch": 150},
    "indexer_paged": {"batch": 5, "context": 3000},
    "select": {"rows": 700, "columns": 5000},
}


def test_every_kernel_whose_blocks_stay_has_a_small_case():
    assert {name.split("-")[0] for name in STAYING} == SMALL.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("name", STAYING)
def test_few_sms_give_what_all_give(name):
    """Blocks that stay go on to the next piece: more of them than where all SMs serve."""
    op, (config, *_) = ops.get(name.split("-")[0]), STAYING[name]
    spec = op.specs(V32)[0]
    sizes = op.sizes_type.from_dict({**op.cases(spec)[0].sizes.to_dict(), **SMALL[op.name]})
    inputs = op.inputs(spec, Case(sizes), Draw(4, "cuda"))
    args = arguments(op, spec, inputs)
    reference = op.reference(spec, inputs)
    with dispatch.override(op, config):
        for sms in (None, 3, 50):
            for _ in range(2):  # the second is a plan's
                found = dispatch.call(op, args, sms)
                result = op.check(spec, inputs, found, reference)
                assert result.passed, (sms, result.detail)
