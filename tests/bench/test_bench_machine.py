"""Host costs and the sweep: measured piece by piece, written piece by piece, and what fails is a row that says so."""

from __future__ import annotations

import pytest

from dsa_codegen.bench import ahead, command, hostcost, results
from dsa_codegen.bench.campaign import Campaign
from dsa_codegen.bench.deadline import Deadline
from dsa_codegen.bench.sweep import METHODS
from dsa_codegen.worker import WorkerDied

from support import H200


class InProcess:
    """A worker that runs its jobs here, as the test's table says."""

    answers: dict = {}  # noqa: RUF012

    def __enter__(self):
        return self

    def __exit__(self, *nothing):
        return None

    def kill(self):
        return None

    def call(self, job, what, *rest, timeout):
        answer = self.answers[what]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "Worker", InProcess)
    monkeypatch.setattr(ahead, "build_ours", lambda cases, gpu: None)
    return Campaign(H200, tmp_path, ["bench_fakes"], "abc1234", {"torch": "2.11"})


def machine(campaign):
    return results.read_machine(results.machine_path(campaign.folder, "h200"))


def swept(context, us=1.0):
    return [{"context": context, "method": method, "us": us, "bytes": 1, "note": ""} for method in METHODS]


def test_a_context_that_fails_costs_no_other(campaign, monkeypatch):
    answers = {(4096,): swept(4096), (8192,): WorkerDied("the worker ended (exit code 9)"), (16384,): swept(16384)}
    monkeypatch.setattr(InProcess, "answers", answers)
    rows = command.run_sweep(campaign, (4096, 8192, 16384))
    assert [(row["context"], row["note"][:6]) for row in rows[::3]] == [(4096, ""), (8192, "failed"), (16384, "")]
    assert machine(campaign)["context"]["rows"] == rows and machine(campaign)["context"]["commit"] == "abc1234"


def test_a_resumed_sweep_measures_what_is_missing(campaign, monkeypatch):
    campaign.note(context={"rows": swept(4096, 7.0), **campaign.facts()})
    monkeypatch.setattr(InProcess, "answers", {(8192,): swept(8192)})
    rows = command.run_sweep(campaign, (4096, 8192), resume=True)
    assert [(row["context"], row["us"]) for row in rows[::3]] == [(4096, 7.0), (8192, 1.0)]
    campaign.commit = "newer"
    monkeypatch.setattr(InProcess, "answers", {(4096,): swept(4096)})
    assert command.run_sweep(campaign, (4096,), resume=True) == swept(4096), "rows of another commit do not count"


def test_what_a_deadline_leaves_is_not_written(campaign, monkeypatch):
    passed = []

    class Last(dict):
        def __getitem__(self, context):
            passed.append(context)
            return swept(*context)

    monkeypatch.setattr(InProcess, "answers", Last())
    campaign.deadline = Deadline(10.0, clock=lambda: 11.0 * len(passed))
    assert command.run_sweep(campaign, (4096, 8192)) == swept(4096)
    assert machine(campaign)["context"]["rows"] == swept(4096)


def test_an_entry_point_that_crashes_is_a_row(campaign, monkeypatch):
    jobs = hostcost.jobs(campaign.sources)
    answers = {job: [hostcost.HostCost(job.name, job.what, 8.0, 5.0)] for job in jobs}
    monkeypatch.setattr(InProcess, "answers", {**answers, jobs[1]: WorkerDied("the worker ended (exit code 9)")})
    rows = command.run_host(campaign)
    assert len(rows) == len(jobs) == 5, "plain launches, and ours in four cases, which the fakes do not serve"
    assert rows[1]["host_us"] is None and rows[1]["note"].startswith("failed: the worker ended")
    assert rows[2]["host_us"] == 8.0 and machine(campaign)["host"]["rows"] == rows
