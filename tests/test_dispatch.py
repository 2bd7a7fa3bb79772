"""Dispatch: CPU tensors go to the reference, torch.compile can trace, overrides are exact, capture never compiles."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen import dispatch, torch_ops
from dsa_codegen.draw import Draw
from dsa_codegen.errors import CaptureError, InputError, NoGpu
from dsa_codegen.op import Case, Config
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.variant import Variant

from support import H200

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


def test_the_fake_kernel_agrees_with_the_real_one():
    inputs, _ = call()
    torch.library.opcheck(
        torch.ops.dsa_codegen.indexer_logits.default,
        (*inputs.values(), "weighted_relu", "fp32", True),
        test_utils="test_faketensor",
    )


def test_override_wins_inside_its_block_only():
    config = Config.of("triton", block_q=1, block_n=64, num_warps=4, num_stages=2, splits=1)
    with dispatch.override(OP, config):
        found = dispatch.chosen(OP, SPEC, CASE.sizes, H200)
        assert (found.config, found.origin) == (config, "override")
    assert dispatch.chosen(OP, SPEC, CASE.sizes, H200).config != config


def test_warmup_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(NoGpu):
            dispatch.warmup([(OP, SPEC, CASE.sizes)])


class FakeGpuCalls:
    """Stands in for a CUDA device: tensors claim to lie on it and variants count their runs."""

    def __init__(self, monkeypatch, capturing=False):
        self.loads, self.runs = [], 0
        monkeypatch.setattr(dispatch, "_device", lambda inputs: torch.device("cuda", 0))
        monkeypatch.setattr(dispatch.torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(dispatch.torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(dispatch.gpus, "detect", lambda: H200)
        monkeypatch.setattr(dispatch, "build", self.build)
        monkeypatch.setattr(Variant, "run", self.run)

    def build(self, rendered, gpu):
        self.loads.append(rendered.sha)
        return self

    def load(self):
        return {}

    def run(self, inputs, outputs):
        self.runs += 1
        return outputs


def test_builds_once_per_spec_and_bucket(monkeypatch):
    fake = FakeGpuCalls(monkeypatch)
    with pytest.warns(dispatch.Untuned, match="python cli.py tune --gpu h200 --op indexer"):
        call()
    call()
    assert (len(fake.loads), fake.runs) == (1, 2)
    assert dispatch.stats() == {"indexer: calls": 2, "indexer: default": 1}


def test_never_compiles_while_a_graph_is_captured(monkeypatch):
    fake = FakeGpuCalls(monkeypatch, capturing=True)
    with pytest.raises(CaptureError, match="warmup"):
        call()
    assert not fake.loads
