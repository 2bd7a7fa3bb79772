"""The adaptive choice: interpreted kernels against the reference, the rules by hand, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.ops.adapt import OP, AdaptSizes, AdaptSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import H200, assert_compiles, assert_matches_reference

SPECS = OP.options(OP.specs(presets.preset("tiny"))[0])
SMALL = Config.of("triton", num_warps=4)


@pytest.mark.parametrize("spec", SPECS, ids=["window", "chosen", "slots", "rows"])
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("topk", [1, 5, 33])
def test_lists_of_a_few_tokens_match_the_reference(interpreter, topk):
    for spec in OP.options(AdaptSpec(topk)):
        for case in OP.cases(spec)[:3]:
            assert_matches_reference(interpreter, OP, spec, Config.of("triton", num_warps=1), case)


@pytest.mark.parametrize(("topk", "mass"), [(3, "window"), (64, "window"), (2048, "window"), (3000, "chosen"), (4096, "none")])
def test_compiles_for_hopper(topk, mass):
    spec = AdaptSpec(topk, mass=mass, counts=True)
    assert_compiles(OP, spec, OP.default_config(spec, AdaptSizes(64, 65536), H200))


def by_hand(scores, topk, mass=None, scale=1.0, of="window", least=-math.inf, most=10**9):
    """The tokens of one window from 0, by plain Python: highest first, and exact sums of their weights."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:topk]
    weights = [math.exp(scale * (score - scores[order[0]])) for score in scores]
    whole = math.fsum(weights if of == "window" else [weights[token] for token in order])
    taken = []
    for token in order:
        reached = mass is not None and math.fsum(weights[each] for each in taken) >= mass * whole
        if reached or scores[token] < least or len(taken) >= most:
            break
        taken.append(token)
    return sorted(taken)


@pytest.mark.parametrize(
    "rule",
    [
        {"mass": 0.5, "scale": 2.0},
        {"mass": 0.9, "of": "chosen"},
        {"mass": 0.01, "scale": 4.0},
        {"mass": 1.0},
        {"least": 1.1},
        {"most": 7},
        {"mass": 0.6, "scale": 3.0, "least": 0.9, "most": 20},
    ],
    ids=str,
)
def test_rules_are_what_they_say(rule):
    scores = Draw(3).normal(5, 400)
    scores[1] = scores[1].round()  # ties
    ends = torch.full((5,), 400, dtype=torch.int32)
    chosen = dsa.select(scores, ends, 64)
    given = {"mass": rule.get("mass"), "mass_of": rule.get("of", "window"), "mass_scale": rule.get("scale", 1.0)}
    given["min_score"] = rule.get("least")
    given["counts"] = torch.full((5,), rule["most"], dtype=torch.int32) if "most" in rule else None
    taken, lengths, best = dsa.adapt(scores, chosen, ends, **given, chosen_scores=True)
    for row in range(5):
        expected = by_hand(scores[row].tolist(), 64, **rule)
        assert taken[row].tolist() == expected + [-1] * (64 - len(expected))
        assert lengths[row] == len(expected)
        assert best[row].tolist() == scores[row, expected].tolist() + [-math.inf] * (64 - len(expected))


def test_no_rule_leaves_the_choice_as_it_is():
    scores = Draw(4).normal(6, 300)
    scores[2, 10:] = torch.nan
    ends = torch.tensor([300, 40, 300, 0, 64, 65], dtype=torch.int32)
    chosen = dsa.select(scores, ends, 64)
    taken, lengths = dsa.adapt(scores, chosen, ends)
    assert torch.equal(taken, chosen)
    assert torch.equal(lengths, (chosen >= 0).sum(1, dtype=torch.int32))


def test_what_is_kept_is_taken_first_and_always():
    scores = Draw(5).normal(1, 300)
    ends = torch.tensor([300], dtype=torch.int32)
    kept = {"keep_first": 4, "keep_recent": 6}
    chosen = dsa.select(scores, ends, 64, **kept)
    ends_of_window = [*range(4), *range(294, 300)]
    taken, lengths = dsa.adapt(scores, chosen, ends, min_score=1e9, counts=torch.tensor([3], dtype=torch.int32), **kept)
    assert (taken[0, :10].tolist(), lengths.tolist()) == (ends_of_window, [10])
    taken, lengths = dsa.adapt(scores, chosen, ends, counts=torch.tensor([12], dtype=torch.int32), **kept)
    others = scores[0, 4:294].topk(2).indices + 4
    assert taken[0, : int(lengths)].tolist() == sorted([*ends_of_window, *others.tolist()])


def test_windows_of_nothing_but_nan_have_no_mass():
    scores = torch.full((2, 100), torch.nan)
    scores[1] = -torch.inf
    ends = torch.full((2,), 100, dtype=torch.int32)
    taken, lengths = dsa.adapt(scores, dsa.select(scores, ends, 64), ends, mass=0.9)
    assert lengths.tolist() == [0, 0]
    assert (taken == -1).all()


def test_a_wrong_length_is_found():
    """Of the check that holds kernels to the reference: one token more or less is not near it."""
    spec = SPECS[0]
    inputs = OP.inputs(spec, Case(AdaptSizes(3, 500), "normal"), Draw(6))
    reference = OP.reference(spec, inputs)
    assert OP.check(spec, inputs, reference, reference).passed
    for more in (-1, 1):
        other = {**reference, "lengths": reference["lengths"] + more}
        assert not OP.check(spec, inputs, other, reference).passed
    swapped = {**reference, "out": reference["out"].flip(1)}
    assert not OP.check(spec, inputs, swapped, reference).passed


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("mass", {"mass": 0.0}),
        ("mass", {"mass": 1.5}),
        ("min_score", {"min_score": math.nan}),
        ("mass_scale", {"mass": 0.5, "mass_scale": 0.0}),
        ("mass_of", {"mass": 0.5, "mass_of": "half"}),
        ("counts", {"counts": torch.zeros(2)}),
        ("masses", {"mass": torch.zeros(3)}),
        ("chosen", {"chosen": torch.zeros(3, 64, dtype=torch.int32)}),
    ],
    ids=str,
)
def test_refuses(argument, changed):
    scores, ends = torch.zeros(2, 100), torch.full((2,), 100, dtype=torch.int32)
    given = {"scores": scores, "chosen": dsa.select(scores, ends, 64), "ends": ends, **changed}
    with pytest.raises(InputError, match=f"^{argument}:"):
        dsa.adapt(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [1, 5, 64, 512, 2048, 4096])
def test_kernels_equal_the_reference(topk):
    from dsa_codegen.gpu import detect
    from dsa_codegen.kernels.build import build
    from dsa_codegen.kernels.render import render
    from dsa_codegen.kernels.variant import Variant
    from dsa_codegen.proof.verify import verify

    gpu = detect()
    for spec in OP.options(replace(SPECS[0], topk=topk)):
        config = OP.default_config(spec, AdaptSizes(64, 65536), gpu)
        variant = Variant(OP, spec, config, gpu, build(render(OP, spec, config), gpu).load())
        for case in OP.cases_for(spec, config):
            result = verify(variant, case, "cuda", repeats=2)
            assert result.passed, (spec, case, result.detail)
