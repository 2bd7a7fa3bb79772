"""A campaign: rows appear one by one, and a peer that takes its process with it costs nobody else their time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re

import pytest
import torch
from typer.testing import CliRunner

from dsa_codegen import cli
from dsa_codegen.bench import ahead, cases, command, results
from dsa_codegen.bench.campaign import Campaign
from dsa_codegen.bench.cases import case
from dsa_codegen.bench.contest import OURS, How
from dsa_codegen.bench.deadline import Deadline
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.errors import NoGpu, SpecError, UnknownName
from dsa_codegen.proof.timing import Policy
from dsa_codegen.worker import Worker, WorkerTimeout

import bench_fakes
from bench_support import SHEET, SMALL
from bench_support import row as row_of
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
    monkeypatch.setattr(campaign, "_culprits", lambda worker, case, error: {OURS: "crashed: made up"})
    with Worker() as worker:
        row = campaign.hold(worker, SMALL, SHEET)
    assert row["ours_us"] is None and row["notes"][OURS] == "failed: no result within 120 s"
    assert row["notes"]["fast"].startswith("left out")


def test_peers_are_timed_though_ours_fails(campaign, monkeypatch):
    real = Campaign._contest

    def ours_fails(self, worker, case, without):
        if OURS not in without:
            raise WorkerTimeout("no result within 60 s")
        return real(self, worker, case, without)

    monkeypatch.setattr(Campaign, "_contest", ours_fails)
    monkeypatch.setattr(Campaign, "_culprits", lambda self, worker, case, error: {OURS: "crashed: made up"})
    with Worker() as worker:
        row = campaign.hold(worker, SMALL, SHEET)
    assert row["ours_us"] is None and row["notes"][OURS] == "crashed: made up"
    assert row["peers"] == {"fast": 10.0, "crashing": 10.0} and row["ratio"] is None


@pytest.mark.slow
def test_who_crashes_again_and_again_is_left_out_of_a_stage(campaign):
    others = [case("indexer_prefill", "causal", {**dict(SMALL.shape), "context": context}) for context in (80, 96)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_FAKE_CRASH", "1")
        first, second, third = campaign.run([SMALL, *others], rebuild=False)
    assert [row["notes"]["crashing"].split(":")[0] for row in (first, second)] == ["crashed"] * 2
    assert third["notes"]["crashing"].startswith("left out after 2 times: crashed: the worker ended")
    assert all(row["peers"] == {"fast": 10.0} for row in (first, second, third))


def test_a_budget_ends_a_run_between_cases(campaign):
    written = []
    campaign.deadline = Deadline(100.0, clock=lambda: 60.0 * len(written))
    campaign.notify = lambda what, done, of, row: written.append(what) if row else None
    other = case("indexer_prefill", "causal", {**dict(SMALL.shape), "context": 80})
    rows = campaign.run([SMALL, other, other], rebuild=False)
    assert [row["shape"]["context"] for row in rows] == [64, 80] and campaign.unreached == [other]
    assert len(results.read_rows(results.rows_path(campaign.folder, "h200"))) == 2


@pytest.mark.parametrize(
    ("left", "waiting", "limit"), [(math.inf, 9, 0.8), (200.0, 100, 0.8), (60.0, 100, 0.3), (1.0, 100, 0.2)]
)
def test_cases_take_shorter_where_all_must_fit(campaign, left, waiting, limit):
    campaign.deadline, campaign._waiting = Deadline(left, clock=lambda: 0.0), waiting
    assert campaign.paced() == dataclasses.replace(campaign.how, limit_s=pytest.approx(limit))


def test_a_case_that_the_budget_cuts_off_is_no_row(campaign, monkeypatch):
    monkeypatch.setattr(campaign, "deadline", Deadline(0.0))
    with Worker() as worker:
        monkeypatch.setattr(campaign, "_contest", _too_late)
        assert campaign.hold(worker, SMALL, SHEET) is None


def _too_late(worker, case, without):
    raise WorkerTimeout("no result within 0 s")


def test_a_first_call_that_ends_its_process_is_remembered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_FAKE_CRASH", "1")
        found = ahead._first_calls([(SMALL, "crashing"), (SMALL, "fast")], ["bench_crash"], "cpu", Deadline())
    assert list(found) == [("crashing", "indexer_prefill")] and "exit code 3" in found["crashing", "indexer_prefill"]


def test_a_resumed_run_leaves_out_what_is_settled(campaign, monkeypatch):
    held = []
    monkeypatch.setattr(Campaign, "run", lambda self, cases: held.append(list(cases)) or [])
    request = command.Request("none", ("select",), per_stage=2, folder=campaign.folder, resume=True)
    first, second = request.cases()
    done = {**row_of(first, 5.0, {}, commit="abc1234"), "against": ["bench_crash"]}
    path = results.rows_path(campaign.folder, "h200")
    for row, left in (
        (done, [second]),
        ({**done, "commit": "older"}, [first, second]),
        ({**done, "against": []}, [first, second]),
        ({**done, "ours_us": None}, [first, second]),
    ):
        path.unlink(missing_ok=True)
        results.merge_rows(path, [row])
        command.run(request, campaign, campaign.notify)
        assert held.pop() == left
    results.merge_rows(path, [{**done, "commit": "abc1234+"}])
    assert results.settled(results.read_rows(path), "abc1234+", ["bench_crash"]) == set()


def test_what_compiles_is_run_once_per_kind(monkeypatch):
    wanted = command.Request().cases()
    found = ahead.first_calls(wanted, lambda case: [_Compiles("compiles")] if case.stage == "select" else [])
    assert sorted(case["context"] for case, _ in found) == [8192, 32768, 65536, 131072]
    assert {name for _, name in found} == {"compiles"}


def test_each_peer_compiles_its_first_before_any_second():
    wanted = command.Request(stages=("select",)).cases()
    found = ahead.first_calls(wanted, lambda case: [_Compiles("one"), _CompilesOnce("two")])
    assert [name for _, name in found] == ["one", "two", "one", "one", "one"]


def test_ours_are_compiled_behind_the_peers(monkeypatch):
    seen = []
    monkeypatch.setattr(ahead, "build_ours", lambda cases, gpu: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    before = os.getpriority(os.PRIO_PROCESS, 0)
    ahead.build([], H200, lambda case: [], [], "cpu", Deadline())
    assert seen == [min(19, before + ahead._NICE)] and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_an_adapter_that_cannot_say_what_it_compiles_stops_nobody():
    found = ahead.first_calls([SMALL], lambda case: [bench_fakes.Broken("broken"), _Compiles("compiles")])
    assert found == [(SMALL, "compiles")]


class _Compiles(bench_fakes.Fake):
    def build_key(self, case):
        return case["context"]


class _CompilesOnce(bench_fakes.Fake):
    def build_key(self, case):
        return self.name


def test_every_kernel_of_a_run_is_known_ahead():
    """The quantisation of a layer, and the portions that a long context is divided into, are no parts of a case's cost."""
    layer = command.Request(stages=("layer_prefill",)).cases()
    longest = command.case_of(1 << 20)
    for some in (layer, [longest]):
        assert {"quantize", "indexer", "select", "attention"} == {each.op for each in ahead.kernels(some, H200)}
    (portion, *_) = stage_of("layer_prefill").helpers(longest)
    assert portion.sizes.queries == 256


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


def test_headlines_come_first():
    wanted = command.Request(stages=("select", "attention_decode"), suites=("core",)).cases()
    assert [each.stage for each in wanted[:3]] == ["select", "attention_decode", "select"]
    assert sorted(wanted, key=str) == sorted(cases.chosen(["select", "attention_decode"]), key=str)


def test_somebody_may_ask_for_a_shape():
    """The stage's headline but for what is said; the same shape twice is one case, and a listed one has the listed key."""
    said = ("batch=96, heads=64", "heads=64,batch=96", "batch=64,extra_k=512,head_dim=512,k=128", "distribution=local")
    first, second, third = command.Request(stages=("attention_decode",), shapes=said).cases()
    (headline,) = cases.chosen(["attention_decode"], per_stage=1)
    assert first.suite == cases.ASKED and first.distribution == headline.distribution
    assert dict(first.shape) == {**dict(headline.shape), "batch": 96, "heads": 64}
    assert second.key in {each.key for each in cases.all_cases()}, "two pools, as the list has them"
    assert (third.shape, third.distribution) == (headline.shape, cases.LOCAL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [["--against", "none"], ["--quick"], ["--suite", "flashmla"], ["--host"], []])
def test_a_benchmark_without_a_gpu_says_so(options):
    result = CliRunner().invoke(cli.app, ["bench", *options])
    assert isinstance(result.exception, NoGpu)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--against", "flash_mla"], UnknownName, "unknown peer 'flash_mla'"),
        (["--suite", "cores"], UnknownName, "unknown suite 'cores'"),
        (["--stage", "attention"], UnknownName, "unknown stage 'attention'"),
        (["--stage", "select", "--suite", "flashmla"], SpecError, "select has cases: core, distributions"),
        (["--sweep", "heads"], SpecError, "context"),
        (["--quick", "--budget", "soon"], SpecError, "240s|90s"),
        (["--quick", "--op", "select"], SpecError, "--op = 'select'"),
        (["--against", "all", "--warm"], SpecError, "--warm"),
        (["--shape", "batch=96"], SpecError, "one stage"),
        (["--stage", "select,attention_decode", "--shape", "rows=9"], SpecError, "one stage"),
        (["--stage", "select", "--shape", "batch=96"], UnknownName, "key of select 'batch'; known: rows, context, k"),
        (["--stage", "select", "--shape", "rows"], SpecError, "key=number"),
        (["--stage", "select", "--shape", "rows=0"], SpecError, "from 1 on"),
        (["--stage", "select", "--shape", "distribution=even"], UnknownName, "'even'"),
        (["--stage", "attention_decode", "--shape", "heads=300"], SpecError, "heads = 300"),
        (["--stage", "attention_decode", "--shape", "head_dim=100"], SpecError, "576 or 512"),
    ],
)
def test_wrong_options_are_named_before_a_gpu_is_looked_for(options, error, words):
    result = CliRunner().invoke(cli.app, ["bench", *options])
    assert isinstance(result.exception, error)
    assert re.search(words, str(result.exception))
