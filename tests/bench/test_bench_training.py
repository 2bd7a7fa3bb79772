"""The stages of training: causal lists, and the peer that is read from a folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsa_codegen.bench.cases import case
from dsa_codegen.bench.peers import cudnn_frontend, tilelang_examples
from dsa_codegen.bench.peers.libraries import PEER_FOLDER
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.bench.training import causal_lists
from dsa_codegen.ops.attention_backward import formulas
from dsa_codegen.problem.draw import Draw

CASE = case("attention_backward", "causal", {"queries": 5, "context": 40, "heads": 4, "head_dim": 576, "k": 32})
PEER = tilelang_examples.PEERS[0]


def test_causal_lists_name_tokens_up_to_the_query_once():
    lists = causal_lists(Draw(0), 70, 90, 8)
    for query, row in enumerate(lists.tolist()):
        named = [token for token in row if token >= 0]
        assert len(set(named)) == len(named) == min(8, query + 1)
        assert all(token <= query for token in named)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """A folder with a file of the example's name that computes by this package's formulas."""
    tilelang_examples._example.cache_clear()
    (tmp_path / tilelang_examples.FILE).write_text(
        "from utils import assert_tensors_similar\n"
        "from dsa_codegen.ops.attention_backward import formulas\n"
        "def sparse_mla_bwd(q, kv, o, do, indices, lse):\n"
        "    late = indices[0, :, 0] > __import__('torch').arange(indices.shape[1])[:, None]\n"
        "    seen = indices[0].masked_fill(late[:, None], -1)\n"
        "    wide = [each[0].float() for each in (q, kv, o, do)]\n"
        "    found = formulas.gradients(*wide[:2], seen, 576**-0.5, wide[2], lse[0] / 1.4426950408889634, wide[3])\n"
        "    return found.dq[None], found.dkv[None]\n"
    )
    monkeypatch.setenv(PEER_FOLDER, str(tmp_path))
    yield
    tilelang_examples._example.cache_clear()


def test_the_example_is_called_as_it_wants_and_agrees(example):
    stage = stage_of(CASE.stage)
    inputs = stage.inputs(CASE, Draw(1))
    prepared = PEER.prepare(CASE, inputs)
    outputs, reference = prepared.outputs(prepared.run()), stage.reference(CASE, inputs)
    accuracy = stage.check(CASE, inputs, outputs, reference, exact=False)
    assert accuracy.passed, accuracy.detail
    assert torch.equal(inputs["indices"] < 0, inputs["indices"] == -1), "the case's own lists stay as they are"


def test_absent_tokens_become_different_ones_behind_the_query(example):
    lists = stage_of(CASE.stage).inputs(CASE, Draw(1))["indices"]
    made = tilelang_examples._behind(lists, CASE["context"])
    query = torch.arange(len(lists))[:, None, None]
    absent = lists < 0
    assert torch.equal(made[~absent], lists[~absent]) and (made > query)[absent].all() and made.max() < CASE["context"]
    assert all(len(set(row[here].tolist())) == int(here.sum()) for row, here in zip(made, absent, strict=True))


def test_without_a_folder_the_peer_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv(PEER_FOLDER, raising=False)
    assert "--peer-folder" in PEER.available()


def test_other_forms_are_not_the_examples(example):
    for other in (("in order", {}), ("causal", {"context": 20}), ("causal", {"head_dim": 512})):
        assert PEER.prepare(case("attention_backward", other[0], {**dict(CASE.shape), **other[1]}), {}) is None


class _CudnnBackward:
    """cuDNN-frontend's plan of a backward, with its own names; it computes by this package's formulas."""

    def __init__(self, sample_q, sample_kv, sample_out, sample_dout, sample_lse, sample_attn_sink, sample_topk_idxs,
                 sample_topk_length=None, softmax_scale=None, block_tile=64, deterministic=False):  # fmt: skip
        assert sample_kv.dim() == sample_topk_idxs.dim() == 2 and sample_attn_sink.shape == sample_q.shape[1:2]
        self.scale, self.ready = softmax_scale, []

    def check_support(self):
        self.ready.append("supported")
        return True

    def compile(self):
        self.ready.append("compiled")

    def scratch_workspace_bytes(self):
        return 64

    def execute(self, q, kv, out, dout, lse, attn_sink, topk_idxs, dq, dkv, topk_length=None, softmax_scale=None,
                current_stream=None, workspace=None, *, d_sink):  # fmt: skip
        assert self.ready == ["supported", "compiled"] and workspace.numel() == 64
        wide = [each.float() for each in (q, kv[:, None], out, dout)]
        found = formulas.gradients(
            *wide[:2], topk_idxs[:, None], self.scale, wide[2], lse, wide[3], lengths=topk_length, sink=attn_sink
        )
        for place, value in ((dq, found.dq), (dkv, found.dkv[:, 0]), (d_sink, found.dsink)):
            place.copy_(value)
        return dq, dkv, d_sink


@pytest.mark.parametrize("head_dim", [512, 576])
def test_cudnns_backward_is_called_as_it_wants_and_agrees(monkeypatch, head_dim):
    monkeypatch.setattr(cudnn_frontend, "imported", lambda name: SimpleNamespace(SparseAttentionBackward=_CudnnBackward))
    each = case("attention_backward", "causal", {**dict(CASE.shape), "head_dim": head_dim})
    stage, peer = stage_of(each.stage), cudnn_frontend.PEERS[-1]
    inputs = stage.inputs(each, Draw(1))
    prepared = peer.prepare(each, inputs)
    accuracy = stage.check(each, inputs, prepared.outputs(prepared.run()), stage.reference(each, inputs), exact=False)
    assert prepared.label == "cuDNN backward" and accuracy.passed, accuracy.detail
    in_order = case("attention_backward", "in order", dict(each.shape))
    assert peer.prepare(in_order, inputs) is None, "on Hopper it has no such form"
