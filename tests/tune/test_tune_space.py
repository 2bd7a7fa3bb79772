"""The search space: fixed integer ranges, what is feasible, which configs are the same candidate."""

from __future__ import annotations

from dataclasses import replace

from dsa_codegen.problem.op import Config, Parameter, exceeds
from dsa_codegen.problem.values import upper
from dsa_codegen.tune.space import _steps, by_size

from support import H200
from toy import OP
from tune_support import DEFAULT, SPACE, config


def test_a_config_is_indices_of_ordered_choices():
    last = Config.of("triton", **{parameter.name: parameter.choices[-1] for parameter in OP.parameters("triton")})
    assert SPACE.decode(SPACE.ranges) == last
    assert SPACE.ranges == {parameter.name: len(parameter.choices) - 1 for parameter in OP.parameters("triton")}


def test_of_a_space_too_large_to_list_some_are_drawn_that_fit():
    drawn, feasible = SPACE.drawn(500), set(SPACE.feasible())
    assert 10 < len(drawn) == len(set(drawn)) < 500 and feasible.issuperset(drawn)
    assert SPACE.drawn(500) == drawn, "the same for every study"
    assert SPACE.drawn(500) != SPACE.drawn(501)[: len(drawn)]


def test_decode_undoes_encode():
    assert SPACE.decode(SPACE.encode(DEFAULT)) == DEFAULT


def test_feasible_are_exactly_those_without_violations():
    feasible = SPACE.feasible()
    assert 0 < len(feasible) < SPACE.size
    assert len(set(feasible)) == len(feasible)
    assert all(not OP.violations(SPACE.spec, each, H200) for each in feasible)
    assert SPACE.feasible(limit=10) is None


def test_what_does_not_reach_the_bucket_is_not_feasible(monkeypatch):
    """Two buckets of one spec have spaces of their own, though they share what is feasible for any."""
    reach = lambda self, spec, config, bucket: exceeds("context", upper(bucket, "context"), 4096 * config["num_stages"])  # noqa: E731
    monkeypatch.setattr(type(OP), "reach", reach)
    near, far = (replace(SPACE, bucket=(("queries", 0, None), ("context", 0, high))) for high in (16385, None))
    assert {each["num_stages"] for each in near.feasible()} == {4, 5}
    assert far.feasible() == []
    assert not near.fits(config(num_stages=3)) and near.fits(config(num_stages=4))
    (violation,) = near.violations(config(num_stages=3))
    assert violation.excess == 16384 / 12288 - 1
    assert {each["num_stages"] for each in near.neighbours(config(num_stages=4))} == {4, 5}
    assert {each["num_stages"] for each in SPACE.feasible()} == {2, 3, 4, 5}


def test_neighbours_are_a_step_away_or_a_trade_and_are_feasible():
    found = SPACE.neighbours(DEFAULT)
    ranks = {parameter.name: by_size(parameter).index for parameter in SPACE.table}
    moves = [sorted(step for name in ranks if (step := ranks[name](each[name]) - ranks[name](DEFAULT[name]))) for each in found]
    assert {tuple(each) for each in moves} == {(-1,), (1,), (-1, 1)} and len(set(found)) == len(found)
    assert all(map(SPACE.fits, found))


def test_a_name_is_a_step_from_every_other_and_is_not_traded():
    schemes = Parameter("scheme", ("row", "split", "both"), "")
    assert _steps(schemes, "split") == [("scheme", 0, "row"), ("scheme", 0, "both")]
    assert _steps(Parameter("items", (8, 4, 16), ""), 8) == [("items", -1, 4), ("items", 1, 16)]


def test_launch_only_values_share_the_source_but_not_the_key():
    one, two, other = (SPACE.candidate(config(splits=1)), SPACE.candidate(config(splits=2)), SPACE.candidate(config(block_q=2)))
    assert one.rendered == two.rendered != other.rendered
    assert len({one.key, two.key, other.key}) == 3
    assert one.key == SPACE.candidate(config(splits=1)).key
