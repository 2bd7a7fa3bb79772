"""Every stage on the GPU, small, beside every peer that is there: all agree, and all are captured in a graph."""

from __future__ import annotations

import pytest

from dsa_codegen.bench import contest, peers
from dsa_codegen.bench.cases import V4_K, case
from dsa_codegen.bench.contest import How
from dsa_codegen.bench.report import labels
from dsa_codegen.bench.summary import summarise
from dsa_codegen.gpu import detect
from dsa_codegen.proof.timing import Policy
from dsa_codegen.worker import Worker

from bench_support import SHEET

pytestmark = pytest.mark.gpu

QUICK = Policy(rounds=3, warmup_ms=1.0)
_INDEX = {"heads": 64, "head_dim": 128}
_PAGED = {"batch": 2, "next_n": 1, "context": 4096, "page": 64}
_K = {"k": 2048}
CASES = [  # the longest first: with several processes they are begun first
    case("layer_prefill", "real", {"queries": 128, "context": 8192, "heads": 128, "head_dim": 576, **_K}),
    case("layer_decode", "real", {**_PAGED, "heads": 64, "head_dim": 576, **_K}),
    case("indexer_prefill", "causal", {"queries": 128, "context": 4096, **_INDEX}),
    case("indexer_decode", "full", {**_PAGED, **_INDEX}),
    case("indexer_decode", "full", {**_PAGED, **_INDEX, "next_n": 3}),
    case("select", "indexed", {"rows": 4, "context": 8192, **_K}),
    case("index_select_prefill", "causal", {"queries": 128, "context": 8192, **_INDEX, **_K}),
    case("index_select_decode", "full", {**_PAGED, **_INDEX, **_K}),
    case("attention_prefill", "local", {"queries": 64, "context": 16384, "heads": 16, "head_dim": 576, **_K}),
    case("attention_prefill", "random", {"queries": 64, "context": 8192, "heads": 128, "head_dim": 512, "k": 512}),
    case("attention_prefill", "local", {"queries": 64, "context": 16384, "heads": 8, "head_dim": 576, **_K}),
    case("attention_prefill", "fp8", {"queries": 64, "context": 8192, "heads": 128, "head_dim": 576, **_K}),
    case("attention_prefill_paged", "local", {"queries": 64, "context": 16384, "heads": 16, "head_dim": 576, "page": 64, **_K}),
    case("attention_decode", "local", {**_PAGED, "next_n": 4, "heads": 8, "head_dim": 576, **_K}),
    case("attention_decode", "random", {**_PAGED, "heads": 128, "head_dim": 512, "k": V4_K}),
    case("select", "normal", {"rows": 512, "context": 8192, **_K}),
    case("attention_decode", "random", {**_PAGED, "next_n": 2, "heads": 128, "head_dim": 576, **_K}),
    case("attention_decode", "random", {**_PAGED, "heads": 64, "head_dim": 512, "k": 512}),
    case("attention_backward", "causal", {"queries": 256, "context": 512, "heads": 64, "head_dim": 576, "k": 128}),
    case("indexer_backward", "whole windows", {"queries": 256, "context": 512, "heads": 128, "head_dim": 576}),
]


@pytest.fixture(scope="module")
def worker():
    """The peers' libraries are loaded in a process of their own: other tests define operators of the same names."""
    with Worker() as worker:
        yield worker


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.id)
def test_all_who_are_there_agree_and_are_timed(worker, each):
    outcome = worker.call(contest.hold, each, detect(), peers.sources(), (), How(QUICK, QUICK, 0.1))
    row = summarise(each, outcome, SHEET)
    assert row["ours_us"] > 0
    assert labels.notes(row) == {}, "nobody fails, disagrees, or cannot be captured in a graph"
