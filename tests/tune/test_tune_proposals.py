"""Proposals: none twice, none that is under way, apart while nothing is known, near the best once something is."""

from __future__ import annotations

import numpy as np
import pytest

from dsa_codegen.problem.op import Parameter
from dsa_codegen.tune.proposals import Proposals, _scale
from dsa_codegen.tune.surrogate import Surrogate

from tune_jobs import landscape
from tune_support import DEFAULT, SPACE


def test_each_config_is_proposed_once_then_none():
    proposals, feasible = Proposals(SPACE, 0, 40), SPACE.feasible()
    seen = []
    for number in range(len(feasible)):
        seen.append(proposals.next())
        proposals.begin(seen[-1])
        if number % 3 == 0:
            proposals.learn(seen[-1], landscape(seen[-1]))
    assert set(seen) == set(feasible) and len(seen) == len(feasible)
    assert proposals.next() is None
    proposals.forget(seen[1])  # it was under way, and nothing came of it
    assert proposals.next() == seen[1]


def test_while_nothing_is_known_they_lie_apart():
    proposals = Proposals(SPACE, 0, 40)
    for _ in range(6):
        proposals.begin(proposals.next())
    points = np.array(proposals._points)[sorted(proposals._under_way)]
    distances = np.abs(points[:, None] - points[None]).sum(axis=2)[~np.eye(len(points), dtype=bool)]
    assert distances.min() > 0.5


def test_failures_keep_away():
    proposals = Proposals(SPACE, 0, 40)
    for config in SPACE.feasible():
        if config["block_n"] == 32:
            proposals.learn(config, None)
    proposals.learn(DEFAULT, landscape(DEFAULT))
    assert proposals.next()["block_n"] != 32


def test_the_last_third_goes_to_neighbours_of_the_fastest():
    proposals, feasible = Proposals(SPACE, 0, 30), SPACE.feasible()
    for config in feasible[:19]:
        proposals.learn(config, landscape(config))
    proposals.learn(feasible[19], None)
    fastest = sorted(feasible[:19], key=landscape)[:2]
    near = {each for config in fastest for each in SPACE.neighbours(config)} - set(feasible[:20])
    for count in range(len(near) + 1):
        proposals.begin(found := proposals.next())
        assert (found in near) == (count < len(near)), "then what promises most, wherever it lies"


def test_what_a_ranking_says_is_expected_until_it_is_timed():
    feasible = SPACE.feasible()
    fastest = min(feasible, key=landscape)
    ranked = {config: 7 * landscape(config) for config in feasible[::3]}  # right but for a factor
    proposals = Proposals(SPACE, 0, 40)
    proposals.expect({**ranked, DEFAULT: 7 * landscape(DEFAULT)})
    proposals.learn(DEFAULT, landscape(DEFAULT))
    for config in feasible[1:12:2]:
        proposals.learn(config, landscape(config))
    assert landscape(proposals.next()) <= 1.3 * landscape(fastest)
    proposals.expect({config: 1 / landscape(config) for config in feasible if config != DEFAULT})  # wrong, and of no standing:
    proposals.expect({})  # the last word counts
    assert proposals.next() is not None


def test_screened_configs_lie_apart_and_are_not_begun():
    proposals = Proposals(SPACE, 0, 40)
    spread = proposals.spread(8)
    assert len(set(spread)) == 8 and not proposals._under_way
    points = np.array(proposals._points)[[proposals._number[config] for config in spread]]
    assert np.abs(points[:, None] - points[None]).sum(axis=2)[~np.eye(8, dtype=bool)].min() > 0.3
    assert len(proposals.spread(10**6)) == len(SPACE.feasible())


def test_values_are_scaled_by_size_not_by_the_order_of_choices():
    assert _scale(Parameter("items", (8, 4, 16), "")) == {4: 0.0, 8: 0.5, 16: 1.0}
    assert _scale(Parameter("early", (False, True), "")) == {False: 0.0, True: 1.0}
    assert _scale(Parameter("scheme", ("row", "split"), "")) == {"row": 0.0, "split": 1.0}
    assert _scale(Parameter("one", (3,), "")) == {3: 0.0}


def test_the_surrogate_learns_which_parameters_matter():
    generator = np.random.default_rng(0)
    points = generator.random((40, 3))
    surrogate = Surrogate(3)
    for _ in range(3):
        surrogate.fit(points, np.sin(3 * points[:, 0]))
    new = generator.random((50, 3))
    found = surrogate.predict(new)
    assert np.abs(found.mean - np.sin(3 * new[:, 0])).mean() < 0.05
    assert surrogate._lengths[0] < min(surrogate._lengths[1:])
    best = int(np.argmin(np.sin(3 * points[:, 0])))
    assert found.improvement(10.0).min() > found.improvement(float(np.sin(3 * points[best, 0]))).max()


def test_what_is_imagined_is_not_asked_for_again():
    surrogate = Surrogate(1)
    surrogate.fit(np.array([[0.0], [1.0]]), np.array([1.0, 2.0]))
    before = surrogate.predict(np.array([[0.5]]))
    surrogate.imagine(np.array([[0.5]]))
    after = surrogate.predict(np.array([[0.5]]))
    assert after.mean == pytest.approx(before.mean, abs=0.05)
    assert after.deviation < 0.3 * before.deviation
