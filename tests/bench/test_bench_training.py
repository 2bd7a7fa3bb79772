"""The stages of training: causal lists, and the peer that is read from a folder."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.bench.cases import case
from dsa_codegen.bench.peers import tilelang_examples
from dsa_codegen.bench.peers.libraries import PEER_FOLDER
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.bench.training import causal_lists
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
