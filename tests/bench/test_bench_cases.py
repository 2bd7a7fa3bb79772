"""The list of cases: complete, unique, and possible."""

from __future__ import annotations

import pytest

from dsa_codegen.bench.cases import KEYS, LOCAL, STAGES, SUITES, all_cases, chosen, headlines_first
from dsa_codegen.bench.problems import Roofs, stage_of
from dsa_codegen.errors import UnknownName
from dsa_codegen.runtime.dispatch import chosen as dispatched

from support import H200

CASES = all_cases()


def test_every_stage_and_suite_has_cases():
    assert {case.stage for case in CASES} == set(STAGES)
    assert {case.suite for case in CASES} == set(SUITES)
    assert [case.stage for case in CASES] == sorted((case.stage for case in CASES), key=STAGES.index)


def test_no_problem_is_listed_twice():
    assert len({case.key for case in CASES}) == len({case.id for case in CASES}) == len(CASES)
    assert all(set(dict(case.shape)) <= set(KEYS) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_case_has_parts_that_fit_and_a_limit(case):
    stage = stage_of(case.stage)
    for part in stage.parts(case):
        config = dispatched(part.op, part.spec, part.sizes, H200).config
        assert not part.op.violations(part.spec, config, H200)
    assert Roofs.of_datasheet(H200).limit_us(stage.costs(case)) > 0
    assert stage.variant(case, H200).count("[") == len(stage.parts(case))


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ("attention_prefill", {"context": 1 << 20, "heads": 128}),
        ("index_select_prefill", {"context": 1 << 20}),
        ("indexer_decode", {"batch": 64, "next_n": 6}),
        ("attention_decode", {"batch": 8, "heads": 64}),
        ("attention_decode", {"batch": 8, "heads": 16}),
        ("layer_decode", {"batch": 1, "heads": 128}),
        ("select", {"rows": 4096, "context": 8192}),
        ("select", {"rows": 8, "context": 131072}),
        ("attention_prefill_paged", {"queries": 4096, "heads": 128}),
        *[
            ("attention_decode", {"batch": b, "heads": h, "head_dim": 512, "k": 640})
            for b in (1, 8, 64, 128)
            for h in (64, 128)
        ],
    ],
)
def test_the_shapes_that_people_ask_about_are_there(stage, wanted):
    assert any(wanted.items() <= dict(case.shape).items() for case in chosen([stage]))


@pytest.mark.parametrize("stage", ["attention_prefill", "attention_prefill_paged", "attention_decode"])
@pytest.mark.parametrize("heads", [8, 16])
def test_ranks_of_eight_have_random_and_neighbouring_lists(stage, heads):
    """The same problem with both, so that their figures can be held beside each other."""
    of = {kind: {case.shape for case in chosen([stage]) if case.distribution == kind} for kind in ("random", LOCAL)}
    assert {shape for shape in of["random"] & of[LOCAL] if dict(shape)["heads"] == heads}


def test_a_run_can_be_cut_to_stages_suites_and_headlines():
    assert {case.suite for case in chosen()} == {"core"}
    assert [case.stage for case in chosen(per_stage=1)] == list(STAGES)
    assert all(case["rows"] for case in chosen(["select"], ["distributions"]))
    headline = chosen(["attention_prefill"], per_stage=1)[0]
    assert (headline["queries"], headline["context"], headline["heads"]) == (4096, 32768, 128)


def test_a_run_that_is_cut_short_has_measured_what_says_most():
    found = headlines_first(all_cases())
    assert set(found) == set(all_cases()) and len(found) == len(all_cases())
    assert [case.stage for case in found[: len(STAGES)]] == list(STAGES)
    rest = [case.suite for case in found[len(STAGES) :]]
    assert "core" not in rest[rest.count("core") :], "other suites come behind what people serve"


@pytest.mark.parametrize(("stages", "suites"), [(["attention"], ["core"]), ([], ["flash"])])
def test_unknown_names_are_refused(stages, suites):
    with pytest.raises(UnknownName):
        chosen(stages, suites)


def test_chained_stages_need_less_than_their_parts():
    (case,) = chosen(["index_select_prefill"], per_stage=1)
    stage = stage_of(case.stage)
    alone = sum(part.op.cost(part.spec, part.case).bytes for part in stage.parts(case))
    assert sum(cost.bytes for cost in stage.costs(case)) < alone / 10, "logits stay on the chip"
