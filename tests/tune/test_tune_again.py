"""Again: a candidate that failed is found by what the run printed, and judged by the process that judged it then."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from rich.console import Console

from dsa_codegen.command import show_tuning
from dsa_codegen.tune import again as room
from dsa_codegen.tune.again import NoTrial, again, load
from dsa_codegen.tune.on_gpu import GpuEvaluator
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.pool import CompilePool

import tune_jobs
from support import H200
from toy import OP
from tune_jobs import timed
from tune_support import DEFAULT, FAKE, config, open_study

BAD = config(block_q=1, block_n=128, splits=8)  # the fake's context is lost with it


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """A journal of a right candidate and a wrong one; how runs name its trials."""
    monkeypatch.setattr(room, "all_ops", lambda: {OP.name: OP})
    study = open_study(tmp_path, seeds=[DEFAULT, BAD])
    for outcome in (timed(50.0), Outcome(Kind.CONTEXT_LOST, detail="an illegal memory access")):
        study.tell(study.ask(), outcome)
    study.close()
    assert study.failed_trial == {Kind.CONTEXT_LOST: 1}
    return str(study.path)


def test_a_trial_is_found_by_its_journal_and_number(journal):
    first, second = load(f"{journal}:0", H200), load(f"{journal}:1", H200)
    assert (first.candidate.config, first.outcome.kind) == (DEFAULT, Kind.OK)
    assert (second.candidate.config, second.outcome.kind) == (BAD, Kind.CONTEXT_LOST)


@pytest.mark.parametrize(
    ("name", "words"),
    [("{}", "it ends in no number"), ("nowhere.journal:0", "no such journal"), ("{}:7", "no candidate was tried there")],
)
def test_what_names_none_is_told(journal, name, words):
    with pytest.raises(NoTrial, match=words):
        load(name.format(journal), H200)


def test_it_must_be_the_same_gpu_and_template(journal, monkeypatch):
    with pytest.raises(NoTrial, match="it is of h200, here is h100"):
        load(f"{journal}:0", dataclasses.replace(H200, id="h100"))
    monkeypatch.setattr(room, "template_sha", lambda name: "0" * 12)
    with pytest.raises(NoTrial, match="template has changed"):
        load(f"{journal}:0", H200)


def test_it_fails_as_it_did(journal, monkeypatch, capsys):
    monkeypatch.setattr(room, "GpuEvaluator", functools.partial(GpuEvaluator, table=FAKE))
    monkeypatch.setattr(room, "CompilePool", functools.partial(CompilePool, compile=tune_jobs.compile_well))
    seen = again(f"{journal}:1", H200)
    assert (seen.before, seen.now.kind) == (Kind.CONTEXT_LOST, Kind.CONTEXT_LOST)
    show_tuning.again(seen)(Console(width=300))
    assert "was context_lost, is context_lost: RuntimeError: CUDA error" in capsys.readouterr().out
