"""Studies: seeds, constraints, repeats, resuming, and journals that were left by the dead or damaged."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import optuna
import pytest

from dsa_codegen.ops.indexer import IndexerSizes
from dsa_codegen.problem.op import Accuracy, Case, Parameter
from dsa_codegen.tune import proposals
from dsa_codegen.tune.lock import StudyBusy
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.space import Space

from support import H200
from toy import OP
from tune_jobs import PASSED, landscape, timed
from tune_support import CASE, DEFAULT, SPACE, config, open_study


def run(study, count=10**6, judge=lambda candidate: timed(landscape(candidate.config))):
    """Ask and tell until ``count`` candidates are evaluated or the study is exhausted."""
    told = []
    while len(told) < count and not study.exhausted:
        candidate = study.ask()
        if candidate is not None:
            study.tell(candidate, judge(candidate))
            told.append(candidate)
    return told


@pytest.fixture
def small(monkeypatch):
    """The indexer with a space so small that all of it can be tried."""
    table = {parameter.name: parameter for parameter in OP.parameters("triton")}
    table["block_q"] = dataclasses.replace(table["block_q"], choices=(2, 4))
    table["num_stages"] = dataclasses.replace(table["num_stages"], choices=(2, 3))
    table["splits"] = dataclasses.replace(table["splits"], choices=(1, 2))
    monkeypatch.setattr(type(OP), "parameters", lambda self, backend: tuple(table.values()))


def test_the_default_is_first_then_the_seeds(tmp_path):
    seeds = [DEFAULT, config(block_q=2), config(block_q=1), config(block_q=3)]  # the last one is no choice
    study = open_study(tmp_path, seeds=seeds)
    assert [candidate.config for candidate in run(study, 3)] == seeds[:3]


def test_what_is_infeasible_is_never_proposed(tmp_path):
    study = open_study(tmp_path, trials=30)
    told = run(study)
    assert all(SPACE.fits(candidate.config) for candidate in told)
    assert len(study._study.trials) == 30, "no proposal was wasted"


def test_a_space_too_large_to_list_is_searched_around_its_best(tmp_path, monkeypatch):
    monkeypatch.setattr(Space, "feasible", lambda self, limit=0: None)
    monkeypatch.setattr(proposals, "_DRAWS", 1)
    study = open_study(tmp_path, trials=60)
    told = run(study)
    assert all(SPACE.fits(candidate.config) for candidate in told)
    assert set(SPACE.neighbours(told[0].config)) <= {candidate.config for candidate in told}
    assert study.best.time_us < landscape(DEFAULT) and study.exhausted


def test_candidates_are_distinct_and_the_budget_counts_them(tmp_path):
    study = open_study(tmp_path, trials=25)
    told = run(study)
    assert len({candidate.key for candidate in told}) == len(told) == 25
    assert study.exhausted and study.ask() is None


def test_failures_are_constraints_not_silence(tmp_path):
    study = open_study(tmp_path, trials=6)
    run(study, judge=lambda candidate: Outcome(Kind.MISMATCH, accuracy=Accuracy(False, 9.0, 0.5, "far off"), detail="far off"))
    told = [trial for trial in study._study.trials if "outcome" in trial.user_attrs]
    assert {trial.state for trial in told} == {optuna.trial.TrialState.PRUNED}
    assert all(trial.constraints["mismatch"] == 1.0 for trial in told)
    assert study.best is None
    assert "far off" in study.first_failure[Kind.MISMATCH]


def test_the_same_seed_proposes_the_same(tmp_path):
    one = run(open_study(tmp_path / "one", trials=12, seed=3))
    two = run(open_study(tmp_path / "two", trials=12, seed=3))
    other = run(open_study(tmp_path / "other", trials=12, seed=4))
    assert [candidate.config for candidate in one] == [candidate.config for candidate in two]
    assert [candidate.config for candidate in one] != [candidate.config for candidate in other]


def test_resumes_where_it_was_left(tmp_path):
    first = open_study(tmp_path, trials=20)
    told = run(first, 12)
    first.close()
    second = open_study(tmp_path, trials=20)
    assert second.seen == first.seen
    assert (second.best, second.counts) == (first.best, first.counts)
    further = run(second)
    assert len(further) == 8
    assert not {candidate.key for candidate in told} & {candidate.key for candidate in further}


def test_every_outcome_survives_the_journal(tmp_path):
    outcomes = [
        Outcome(kind, accuracy=PASSED if kind is Kind.MISMATCH else None, smem=7, detail="why")
        for kind in Kind
        if kind not in (Kind.OK, Kind.INFEASIBLE)
    ]
    outcomes += [timed(5.0), dataclasses.replace(timed(50.0), dominated=True)]
    study = open_study(tmp_path)
    turn = iter(outcomes)
    run(study, len(outcomes), lambda candidate: next(turn))
    study.close()
    again = open_study(tmp_path)
    assert list(again.seen.values()) == list(study.seen.values())
    assert [outcome.time_us for _, outcome in again.fastest(5)] == [5.0], "a dominated candidate is not a finalist"


@pytest.mark.parametrize("outcome", [timed(5.0), Outcome(Kind.LAUNCH_ERROR, detail="too many registers")], ids=["ok", "failed"])
def test_what_was_known_when_a_run_died_counts(tmp_path, outcome):
    """It was killed between a trial's last two lines: those who go on from there do not know less than those who look."""
    dead = open_study(tmp_path)
    candidate = dead.ask()
    dead._pending[candidate.key].set_user_attr("outcome", outcome.to_json())
    dead._lock.release()
    alive = open_study(tmp_path)
    assert list(alive.seen) == [candidate.key] and alive.ask().key != candidate.key
    alive.close()
    assert alive._study.trials[0].state.name in ("COMPLETE", "PRUNED")
    assert list(open_study(tmp_path).seen) == [candidate.key]


def test_a_trial_is_three_lines_of_the_journal(tmp_path):
    """Each waits for the disk: when it begins, what came of it, and that it is over."""
    study = open_study(tmp_path)
    lines = lambda: len(study.path.read_text().splitlines())  # noqa: E731
    before, candidate = lines(), study.ask()
    assert lines() == before + 1
    study.tell(candidate, timed(5.0))
    assert lines() == before + 3
    (trial,) = study._study.get_trials()
    assert study.space.decode(trial.params) == candidate.config and trial.value == 5.0


def test_what_a_dead_run_left_open_is_released(tmp_path):
    dead = open_study(tmp_path)
    lost = dead.ask()
    dead._lock.release()  # as the operating system does it for a killed process
    alive = open_study(tmp_path)
    assert not [trial for trial in alive._study.trials if trial.state is optuna.trial.TrialState.RUNNING]
    assert alive.ask().config == lost.config == DEFAULT


def test_closing_gives_up_what_is_under_way(tmp_path):
    study = open_study(tmp_path)
    study.ask()
    study.close()
    assert Counter(trial.state for trial in study._study.trials) == {optuna.trial.TrialState.FAIL: 1}


def test_one_process_at_a_time(tmp_path):
    study = open_study(tmp_path)
    with pytest.raises(StudyBusy, match="another tuning run"):
        open_study(tmp_path)
    study.close()
    open_study(tmp_path)


def test_a_damaged_journal_is_put_aside(tmp_path):
    study = open_study(tmp_path)
    run(study, 3)
    study.close()
    lines = study.path.read_text().splitlines(keepends=True)
    study.path.write_text("".join([*lines[:5], lines[5][:10] + "\n", *lines[6:]]))
    with pytest.warns(UserWarning, match="cannot be read"):
        again = open_study(tmp_path)
    assert not again.seen
    assert list(study.path.parent.glob("*.corrupt-*"))


def test_a_line_cut_off_by_a_kill_costs_no_more_than_that_line(tmp_path):
    study = open_study(tmp_path)
    run(study, 4)
    study.close()
    with study.path.open("a") as file:
        file.write('{"op_code": 6, "wor')
    again = open_study(tmp_path)
    assert len(again.seen) >= 3
    run(again, 2)
    again.close()
    assert len(open_study(tmp_path).seen) >= 5


@pytest.mark.parametrize("change", ["case", "method", "gpu", "choices"])
def test_what_does_not_compare_is_another_study(tmp_path, monkeypatch, change):
    study = open_study(tmp_path)
    changes = {
        "case": {"case": Case(IndexerSizes(512, 8192), "causal")},
        "method": {"method": "modelled-1"},
        "gpu": {"space": dataclasses.replace(SPACE, gpu=dataclasses.replace(H200, sms=78))},
        "choices": {},
    }[change]
    if change == "choices":
        table = (*OP.parameters("triton")[:-1], Parameter("num_warps", (4,), "fewer"))
        monkeypatch.setattr(type(OP), "parameters", lambda self, backend: table)
    assert open_study(tmp_path, **changes).path != study.path


def test_identity_is_readable(tmp_path):
    study = open_study(tmp_path)
    identity = study._study.user_attrs["identity"]
    assert identity["spec"]["heads"] == 64
    assert json.loads(json.dumps(identity)) == identity
    assert study.label == "indexer.triton, queries 1025+, context 16385+"


def test_fresh_forgets(tmp_path):
    study = open_study(tmp_path)
    run(study, 3)
    study.close()
    assert not open_study(tmp_path, fresh=True).seen


def test_a_small_space_is_tried_in_full(small, tmp_path):
    study = open_study(tmp_path, trials=60, seeds=[DEFAULT])
    told = run(study)
    assert {candidate.config for candidate in told} == set(SPACE.feasible())
    assert told[0].config == DEFAULT
    study.close()
    assert open_study(tmp_path, trials=60).exhausted


def test_ends_when_nothing_is_left(small, tmp_path):
    study = open_study(tmp_path, trials=10**6)
    study._rest = None  # as if the space were too large to list
    run(study)
    assert study.exhausted
    assert len(study.seen) == len(SPACE.feasible())


def test_a_fatal_outcome_ends_the_study(tmp_path):
    study = open_study(tmp_path)
    run(study, judge=lambda candidate: Outcome(Kind.LAUNCH_ERROR, detail="no memory for the inputs", fatal=True))
    assert study.failure == "no memory for the inputs"
    assert not study.seen


def test_a_rejected_winner_stays_rejected(tmp_path):
    study = open_study(tmp_path)
    (candidate,) = run(study, 1)
    study.reject(candidate, Outcome(Kind.MISMATCH, detail="a repeat differs bitwise"))
    study.close()
    again = open_study(tmp_path)
    assert again.seen[candidate.key][1].kind is Kind.MISMATCH
    assert again.outcome_of(DEFAULT)[1].kind is Kind.MISMATCH
    assert again.case == CASE
