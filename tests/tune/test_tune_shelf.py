"""Where trials are kept: a database takes and gives what a file does, for several machines at once, and says what is wrong."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

from dsa_codegen.errors import InputError
from dsa_codegen.tune import study as studies
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.shelf import Database, Memory

import postgres
from tune_jobs import landscape, timed
from tune_support import DEFAULT, open_study


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request, tmp_path_factory):
    """A database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('db')}/trials.db"
    else:
        with postgres.server() as found:
            yield found


def step(study, count=1):
    """Evaluate so many candidates."""
    told = []
    for _ in range(count):
        candidate = study.ask()
        if candidate is None:  # others have tried the rest
            break
        study.tell(candidate, timed(landscape(candidate.config)))
        told.append(candidate)
    return told


def test_another_machine_goes_on_from_there(url, tmp_path):
    first = open_study(tmp_path / "one", trials=12, shelf=Database(url), fresh=True)
    told = step(first, 4)
    first.close()
    assert not list(tmp_path.glob("**/*.journal")), "nothing lies in files"
    second = open_study(tmp_path / "two", trials=12, shelf=Database(url))
    assert list(second.seen.values()) == list(first.seen.values())
    assert not {candidate.key for candidate in step(second, 2)} & {candidate.key for candidate in told}
    assert not open_study(tmp_path / "three", shelf=Database(url), fresh=True).seen


def test_machines_share_a_study_while_both_search(url, tmp_path):
    one = open_study(tmp_path / "one", trials=10, shelf=Database(url), fresh=True)
    two = open_study(tmp_path / "two", trials=10, shelf=Database(url))
    while not one.exhausted:
        step(one)
        if not two.exhausted:
            step(two)
    assert two.ask() is None
    assert one.seen.keys() == two.seen.keys() and len(one.seen) == 10
    assert one.best.time_us == two.best.time_us


def test_what_another_machine_has_begun_is_left_to_it_until_it_is_lost(url, tmp_path, monkeypatch):
    lost = open_study(tmp_path / "one", shelf=Database(url), fresh=True)
    assert lost.ask().config == DEFAULT
    other = open_study(tmp_path / "two", shelf=Database(url))
    assert [trial.state for trial in other._study.trials] == [TrialState.RUNNING]
    other.close()
    monkeypatch.setattr(studies, "_STALE_S", 0.0)
    later = open_study(tmp_path / "two", shelf=Database(url))
    assert [trial.state for trial in later._study.trials] == [TrialState.FAIL]


def test_outcomes_survive(url, tmp_path):
    study = open_study(tmp_path, shelf=Database(url), fresh=True)
    study.tell(study.ask(), Outcome(Kind.MISMATCH, detail="far off"))
    study.close()
    again = open_study(tmp_path, shelf=Database(url))
    assert [outcome for _, outcome in again.seen.values()] == [Outcome(Kind.MISMATCH, detail="far off")]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("no url", "postgresql://"),
        ("nosuch://host/db", "nosuch"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:1/db", r"me:\*\*\*@127\.0\.0\.1"),
    ],
)
def test_what_is_no_database_is_refused(wrong, says):
    with pytest.raises(InputError, match=says) as error:
        Database(wrong)
    assert "secret" not in str(error.value)


def test_in_memory_nothing_is_kept(tmp_path):
    study = open_study(tmp_path, shelf=Memory())
    step(study, 2)
    study.close()
    assert not list(tmp_path.iterdir())
    assert not open_study(tmp_path, shelf=Memory()).seen
