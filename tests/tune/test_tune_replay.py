"""Replays of what a GPU has measured: the search loses little, on a clock of its own, and says the same for the same seed."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from dsa_codegen.tune import regret, sweep
from dsa_codegen.tune.replay import Clock, ReplayEvaluator, SweptSpace

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "sweeps"
FILES = sorted(FOLDER.glob("*.json"))
SELECT = FOLDER / "select-cuda-h200.json"
LOST = 0.02
"""By a search of the default budget, on average over seeds."""


@pytest.fixture(scope="module")
def select():
    return sweep.read(SELECT)


def losses(swept, case, seeds, **options):
    return regret.regret(swept, case, [regret.search(swept, case, seed, **options) for seed in seeds])


def test_a_search_loses_little(select):
    found = losses(select, 0, range(2))
    assert found.mean <= 2 * LOST
    assert all(run.trials == 48 and 5 < run.seconds < 120 for run in found.runs), "and takes as long as it would"
    assert losses(select, 0, range(2)).runs == found.runs, "the same for the same seeds"


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_is_searched_well(path):
    swept = sweep.read(path)
    for case in range(len(swept.cases)):
        found = losses(swept, case, range(20))
        assert found.mean <= LOST, found.label
        assert found.mean <= max(found.of(found.default_us), 0.0) + 1e-9, "never worse than the default"


def test_trying_all_finds_the_best_or_a_tie(select):
    found = losses(select, 2, [0], trials=10**6)
    assert found.same == 1.0 and found.runs[0].trials == found.configs


def test_the_space_is_what_was_swept(select):
    space = SweptSpace.of(select, 2)
    feasible = space.feasible()
    assert len(feasible) == 425 and all(space.fits(config) for config in feasible)
    beyond = next(entry.config for entry in select.entries if entry.config not in set(feasible))
    assert not space.fits(beyond), "a row that its registers do not hold"
    assert len({space.candidate(config).key for config in feasible}) == 425


def test_a_candidate_gets_one_of_its_visits_and_a_final_draws_again(select):
    evaluator = ReplayEvaluator(select, 0, 7, Clock())
    space, case = SweptSpace.of(select, 0), select.cases[0]
    candidate = space.candidate(case.default)
    visits = case.results[select.number[case.default]]
    taken = [evaluator.final(None, [candidate], 1.0)[0].timing for _ in range(5)]
    assert {timing.n for timing in taken} == {len(visits)}
    assert all(min(visits) <= timing.median <= max(visits) for timing in taken)
    assert statistics.median(visits) == case.time_us(select.number[case.default])
