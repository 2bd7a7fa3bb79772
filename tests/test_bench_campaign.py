"""A campaign: rows appear one by one, and a peer that takes its process with it costs nobody else their time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import cli
from dsa_codegen.bench import ahead, command, results
from dsa_codegen.bench.campaign import Campaign
from dsa_codegen.bench.contest import OURS, How
from dsa_codegen.errors import NoGpu, UnknownName
from dsa_codegen.timing import Policy
from dsa_codegen.worker import Worker, WorkerTimeout

import bench_fakes
from bench_support import SHEET, SMALL
from support import H200

QUICK = Policy(reps=2, rounds=3, warmup_ms=0)
GPU = dataclasses.replace(H200, l2=1)


@pytest.fixture
def campaign(tmp_path):
    how = How(QUICK, QUICK, device="cpu", stopwatch=bench_fakes.Clock())
    return Campaign(GPU, tmp_path, ["bench_crash"], "abc1234", {"torch": "2.11"}, how)


def test_a_crash_is_a_note_in_the_row(campaign):
    seen = []
    campaign.notify = lambda what, done, of, row: seen.append((what, done, of, row is not None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_FAKE_CRASH", "1")
        (row,) = campaign.run([SMALL], rebuild=False)
    assert row["notes"]["crashing"].startswith("crashed: the worker ended")
    assert row["notes"]["missing"] == "missing is not installed"
    assert row["peers"] == {"fast": 10.0}
    assert row["ours_us"] == 10.0, "20 µs for 2 calls"
    assert seen == [(SMALL.id, 0, 1, False), (SMALL.id, 1, 1, True)]
    (written,) = json.loads(results.rows_path(campaign.folder, "h200").read_text())
    assert written == json.loads(json.dumps(row))
    assert written["commit"] == "abc1234" and set(results.REQUIRED) <= set(written)


def test_everybody_failing_is_still_a_row(campaign, monkeypatch):
    def nobody(worker, case, without):
        raise WorkerTimeout("no result within 120 s")

    monkeypatch.setattr(campaign, "_contest", nobody)
    monkeypatch.setattr(campaign, "_culprits", lambda worker, case: {OURS: "crashed: made up"})
    with Worker() as worker:
        row = campaign.hold(worker, SMALL, SHEET)
    assert row["ours_us"] is None and row["notes"][OURS] == "failed: no result within 120 s"
    assert row["notes"]["fast"].startswith("left out")


def test_what_compiles_is_run_once_per_kind(monkeypatch):
    cases = command.Request().cases()
    found = ahead.first_calls(cases, lambda case: [_Compiles("compiles")] if case.stage == "select" else [])
    assert sorted(case["context"] for case, _ in found) == [8192, 32768, 65536, 131072]
    assert {name for _, name in found} == {"compiles"}


class _Compiles(bench_fakes.Fake):
    def build_key(self, case):
        return case["context"]


def test_our_kernels_of_a_run_are_each_built_once():
    rendered = ahead.kernels(command.Request(stages=("indexer_prefill", "index_select_prefill")).cases(), H200)
    assert len({each.sha for each in rendered}) == len(rendered) >= 4


def test_requests_name_adapters():
    assert command.chosen_sources("none") == ()
    assert command.chosen_sources("deep_gemm,flashmla") == (
        "dsa_codegen.bench.peers.deep_gemm",
        "dsa_codegen.bench.peers.flashmla",
    )
    assert len(command.chosen_sources("all")) >= 7
    with pytest.raises(UnknownName, match="flashmla"):
        command.chosen_sources("flash_mla")


def test_a_campaign_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(cli.app, ["bench", "--against", "none"])
    assert isinstance(result.exception, NoGpu)
