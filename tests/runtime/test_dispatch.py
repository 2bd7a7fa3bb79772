"""Dispatch: CPU tensors go to the reference, torch.compile can trace, overrides are exact, capture never compiles."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.errors import BuildError, CaptureError, InputError, NoGpu
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.render import render
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config, Launch
from dsa_codegen.runtime import dispatch, torch_ops

from fake_gpu import FakeGpu
from support import H200, arguments, of_preset

SPEC = IndexerSpec(8, 64)
CASE = Case(IndexerSizes(5, 40), "ragged")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setattr("dsa_codegen.paths.shipped_records", lambda: tmp_path)  # whatever tuned/ holds
    dispatch.reset()
    yield
    dispatch.reset()


def call(**options):
    inputs = OP.inputs(SPEC, CASE, Draw(3))
    return inputs, torch_ops.function("indexer_logits")(*inputs.values(), **options)


def test_cpu_tensors_go_to_the_reference():
    inputs, logits = call(clean=True)
    expected = OP.reference(IndexerSpec(8, 64, clean=True), inputs)["logits"]
    assert torch.equal(logits, expected)
    assert dispatch.stats() == {"indexer: reference": 1}


def test_the_operator_refuses_before_it_runs():
    with pytest.raises(InputError, match=r"^logits"):
        call(logits="fp64")


def test_torch_compile_traces_the_operator():
    inputs, eager = call(clean=True)
    compiled = torch.compile(
        lambda *tensors: torch_ops.function("indexer_logits")(*tensors, clean=True), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(*inputs.values()), eager)


PAIRS = [(op, spec) for op in ops.all_ops().values() for spec in op.options(of_preset(op)[-1])[:2]]
every_operation = pytest.mark.parametrize(("op", "spec"), PAIRS, ids=lambda value: getattr(value, "id", None) or value.name)


@every_operation
def test_the_fake_kernel_agrees_with_the_real_one(op, spec):
    args = arguments(op, spec, op.inputs(spec, op.cases(spec)[0], Draw(3)))
    torch.library.opcheck(torch_ops.function(op.function), tuple(args), test_utils="test_faketensor")


@every_operation
def test_one_trace_serves_all_sizes(op, spec):
    """Sizes become symbols in the second trace: a decode batch that grows and shrinks is not compiled again and again."""
    torch._dynamo.reset()
    traces = []

    def count(graph, example):
        traces.append(graph)
        return graph

    operator = torch_ops.function(op.function)
    traced = torch.compile(lambda *args: operator(*args), backend=count, fullgraph=True)
    case = op.cases(spec)[0]
    for factor in (1, 2, 3, 4):
        larger = {name: factor * max(size, 2) for name, size in case.sizes.to_dict().items()}
        inputs = op.inputs(spec, replace(case, sizes=op.sizes_type.from_dict(larger)), Draw(3))
        traced(*arguments(op, spec, inputs))
    assert len(traces) <= 2


def test_override_wins_inside_its_block_only():
    config = Config.of("triton", block_q=1, block_n=64, num_warps=4, num_stages=2, splits=1)
    with dispatch.override(OP, config):
        found = dispatch.chosen(OP, SPEC, CASE.sizes, H200)
        assert (found.config, found.origin) == (config, "override")
    assert dispatch.chosen(OP, SPEC, CASE.sizes, H200).config != config


def test_overrides_that_overlap_end_in_any_order():
    """So blocks of several threads do."""
    one, other = (Config.of("triton", block_q=1, block_n=64, num_warps=4, num_stages=2, splits=splits) for splits in (1, 2))

    def chosen() -> Config:
        return dispatch.chosen(OP, SPEC, CASE.sizes, H200).config

    usual = chosen()
    first, second, equal = dispatch.override(OP, one), dispatch.override(OP, other), dispatch.override(OP, other)
    first.__enter__()
    second.__enter__()
    equal.__enter__()
    first.__exit__(None, None, None)
    assert chosen() == other
    second.__exit__(None, None, None)
    assert chosen() == other
    equal.__exit__(None, None, None)
    assert chosen() == usual
    assert usual not in (one, other)


def test_warmup_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(NoGpu):
            dispatch.warmup([(OP, SPEC, CASE.sizes)])


def test_builds_once_per_spec_and_bucket(monkeypatch):
    fake = FakeGpu(monkeypatch)
    with pytest.warns(dispatch.Untuned, match="python cli.py tune --gpu h200 --op indexer"):
        call()
    call()
    assert (len(fake.builds), len(fake.runs)) == (1, 2)
    assert dispatch.stats() == {"indexer: built during a call": 1, "indexer: calls": 2, "indexer: default": 1}


def test_a_default_that_does_not_build_gives_way_to_the_next_guess(monkeypatch):
    FakeGpu(monkeypatch)
    refused = OP.default_config(SPEC, CASE.sizes, H200)
    plain, sha = dispatch.build, render(OP, SPEC, refused).sha

    def build(rendered, gpu):
        if rendered.sha == sha:
            raise BuildError("indexer", "a compiler of another day")
        return plain(rendered, gpu)

    monkeypatch.setattr(dispatch, "build", build)
    with pytest.warns(dispatch.Untuned, match=r"does not build here, triton\(.* stands in \(.*another day"):
        call()
    assert dispatch.stats()["indexer: stand-in"] == 1
    with dispatch.override(OP, refused), pytest.raises(BuildError):  # who asks for a config gets it or an error
        call()


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_buckets_that_share_a_source_share_what_is_loaded(monkeypatch):
    fake, loads = FakeGpu(monkeypatch, gpus={0: H200, 1: H200}), []
    monkeypatch.setattr(fake, "load", lambda: loads.append(fake.current) or {})
    wanted = [(OP, SPEC, IndexerSizes(queries, 40)) for queries in (5, 2000)]
    with dispatch.override(OP, Config.of("triton", block_q=1, block_n=64, num_warps=4, num_stages=2, splits=1)):
        assert dispatch.warmup(wanted) == 2
        fake.current = 1
        assert dispatch.warmup(wanted) == 2
    assert loads == [0, 1]


def test_what_was_warmed_up_is_not_built_during_a_call(monkeypatch):
    FakeGpu(monkeypatch)
    dispatch.reset()
    with dispatch.override(OP, Config.of("triton", block_q=1, block_n=64, num_warps=4, num_stages=2, splits=1)):
        dispatch.warmup([(OP, SPEC, IndexerSizes(5, 40))])
        call()
        assert "indexer: built during a call" not in dispatch.stats()


def test_never_compiles_while_a_graph_is_captured(monkeypatch):
    fake = FakeGpu(monkeypatch, capturing=True)
    with pytest.raises(CaptureError, match="warmup"):
        call()
    assert not fake.builds


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_each_device_is_served_by_its_own_gpu(monkeypatch):
    """The second device is another model: its kernels are built for it, and launched while it is the current one."""
    l40s = resolve("L40S")
    fake = FakeGpu(monkeypatch, gpus={0: H200, 1: l40s})
    call()
    fake.device = 1
    call()
    call()
    assert [gpu for _, gpu in fake.builds] == [H200, l40s]
    assert [variant.gpu for variant in fake.runs] == [H200, l40s, l40s]
    assert fake.entered == [1, 1]
    assert not OP.violations(SPEC, fake.runs[-1].config, l40s)


def test_warmup_serves_the_current_device_and_complains_once(monkeypatch):
    fake = FakeGpu(monkeypatch, gpus={0: H200, 1: resolve("L40S")}, device=1)
    fake.current = 1
    wanted = [(OP, SPEC, IndexerSizes(queries, context)) for queries in (5, 6, 2000) for context in (40, 20000)]
    with pytest.warns(dispatch.Untuned) as complaints:
        assert dispatch.warmup(wanted) == 4  # buckets
    (complaint,) = complaints
    assert str(complaint.message).count("is not tuned for NVIDIA L40S") == 4
    assert {gpu.id for _, gpu in fake.builds} == {"l40s"}
    before = len(fake.builds)
    call()
    assert dispatch.warmup(wanted) == 0
    assert len(fake.builds) == before


def test_a_loaded_variant_has_launched_each_of_its_kernels(monkeypatch):
    """TileLang loads code at a kernel's first launch, which must not be the captured one."""
    launched = []

    def launches(*args):  # which kernels a call launches may depend on its sizes: here no case launches both
        kernel = "first" if len(launched) < 2 else "second"
        return [Launch(kernel, (1, 1, 1), (kernel,))]

    fake = FakeGpu(monkeypatch)
    monkeypatch.setattr(fake, "load", lambda: dict.fromkeys(("first", "second"), lambda grid, args: launched.extend(args)))
    monkeypatch.setattr(OP, "launches", launches)
    monkeypatch.setattr("dsa_codegen.kernels.variant.Draw", lambda seed, device: Draw(seed))
    with pytest.warns(dispatch.Untuned):
        dispatch.warmup([(OP, SPEC, CASE.sizes)])
    assert launched == ["first", "first", "second"]


def test_counts_are_exact_with_many_threads():
    calls, threads = 500, 8
    inputs = OP.inputs(SPEC, Case(IndexerSizes(1, 1), "causal"), Draw(3)).values()

    def work():
        for _ in range(calls):
            torch_ops.function("indexer_logits")(*inputs)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for _ in range(10):
        dispatch.stats()  # looking does not count
    for worker in workers:
        worker.join()
    assert dispatch.stats() == {"indexer: reference": calls * threads}
