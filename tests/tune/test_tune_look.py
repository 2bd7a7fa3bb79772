"""To look at: the history of a search and what mattered in it; the dashboard, or a clear word where it is not installed."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

import pytest

from dsa_codegen.errors import ToolMissing
from dsa_codegen.tune import dashboard
from dsa_codegen.tune.history import histories

from command_line import cli
from tune_jobs import timed
from tune_support import open_study


def searched(folder, count=24, judge=lambda config: 100.0 * config["num_stages"] + config["splits"]):
    """A study some of whose candidates were judged; its journal lies in ``folder``."""
    study = open_study(folder / "h200", trials=count)
    while not study.exhausted:
        candidate = study.ask()
        if candidate is not None:
            study.tell(candidate, timed(judge(candidate.config)))
    study.close()
    return study


def test_what_mattered_comes_first(tmp_path):
    searched(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((history,),) = histories(tmp_path).values()
    assert len(history["times_us"]) == 24
    assert sum(history["importance"].values()) == pytest.approx(1.0, abs=1e-2)
    assert next(iter(history["importance"])) == "num_stages"


@pytest.mark.parametrize("judge", [lambda config: 5.0, None], ids=["alike", "too few"])
def test_nothing_is_said_to_matter_where_nothing_shows_it(tmp_path, judge):
    searched(tmp_path, **({"judge": judge} if judge else {"count": 4}))
    ((history,),) = histories(tmp_path).values()
    assert history["importance"] == {}


def test_the_dashboard_is_given_every_study(tmp_path, monkeypatch):
    study = searched(tmp_path, count=9)
    served = []
    fake = SimpleNamespace(run_server=lambda storage, host, port: served.append((storage, host, port)))
    monkeypatch.setitem(sys.modules, "optuna_dashboard", fake)
    dashboard.show(dashboard.snapshot(tmp_path), 8123)
    ((storage, host, port),) = served
    (found,) = storage.get_all_studies()
    assert (host, port) == ("127.0.0.1", 8123), "nobody else's machine sees it"
    assert found.study_name == f"h200 {study._study.study_name}"
    assert len(storage.get_all_trials(found._study_id)) >= 9


def test_the_dashboard_serves_them(tmp_path):
    """The real one, where it is installed."""
    server = pytest.importorskip("optuna_dashboard", reason="the extra dashboard")
    study = searched(tmp_path, count=5)
    answers = []
    served = server.wsgi(dashboard.snapshot(tmp_path))
    environment = {"PATH_INFO": "/api/studies"}
    setup_testing_defaults(environment)
    body = b"".join(served(environment, lambda status, headers, error=None: answers.append(status)))
    assert answers == ["200 OK"] and study._study.study_name in body.decode()


def test_where_it_is_not_installed_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(ToolMissing, match="dashboard"):
        dashboard.server()
    shown = cli("tune", "--dashboard", cwd=tmp_path, hidden=["optuna_dashboard"])
    assert shown.returncode == 3
    assert "optuna-dashboard was not found" in shown.stderr and "pip install -e '.[dashboard]'" in " ".join(
        shown.stderr.split()
    )


def test_without_a_search_there_is_nothing_to_show(tmp_path):
    with pytest.raises(dashboard.NoStudies, match="run `tune` there first"):
        dashboard.snapshot(tmp_path)
    shown = cli("tune", "--dashboard", "--trials", "3", cwd=tmp_path)
    assert shown.returncode == 2 and "only without --dashboard" in " ".join(shown.stderr.split())
