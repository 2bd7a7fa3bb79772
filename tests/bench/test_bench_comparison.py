"""Two runs beside each other: what differs most comes first, and more than five per cent is a failure."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dsa_codegen import cli, gpu
from dsa_codegen.bench import comparison, regression, results
from dsa_codegen.bench.campaign import Campaign
from dsa_codegen.bench.cases import case
from dsa_codegen.errors import RecordError

from bench_support import SMALL, row
from support import H200

SELECT = case("select", "normal", {"rows": 1, "context": 8192, "k": 2048})
ALONE = case("select", "relu", dict(SELECT.shape))


def runs():
    """Two runs: the indexer's ratio falls by 3 %, the selection's by 10 %, one case is in the first only."""
    first = [
        row(SMALL, 100.0, {"DeepGEMM": 150.0}),
        row(SELECT, 10.0, {"fast_topk": 20.0}),
        row(ALONE, 5.0, {"fast_topk": 9.0}),
    ]
    second = [row(SMALL, 100.0, {"DeepGEMM": 145.5}), row(SELECT, 11.2, {"fast_topk": 20.16})]
    return first, second


def test_the_worst_comes_first():
    found = comparison.compare(*runs())
    assert [(pair.stage, round(pair.difference, 3)) for pair in found.pairs] == [
        ("Selection", -0.1),
        ("Indexer, prefill", -0.03),
    ]
    assert [pair.stage for pair in found.outside] == ["Selection"]
    assert found.pairs[0].why == "ours 10 → 11.2" and found.pairs[1].why == "DeepGEMM 150 → 145.5"
    assert len(found.alone) == 1 and "relu" in found.alone[0]


@pytest.mark.parametrize(("before", "told"), [(results.MIXED, {}), ("", {("alternating", "mixed"): 2})])
def test_rows_of_other_turns_are_not_compared_in_silence(tmp_path, before, told):
    first, second = runs()
    for each in first:
        each["turns"] = before
    for each in first if not before else ():
        del each["turns"]  # as rows of before are
    assert comparison.compare(first, second).unlike == comparison.against(first, second).unlike == told
    results.merge_rows(tmp_path / "one.json", first)
    results.merge_rows(tmp_path / "two.json", second)
    result = CliRunner().invoke(cli.app, ["report", "--compare", str(tmp_path / "one.json"), str(tmp_path / "two.json")])
    assert ("2 were timed in other turns: alternating, then mixed" in result.output) == bool(told), result.output


def test_a_case_without_a_ratio_is_not_compared():
    first, _ = runs()
    assert comparison.compare(first, [row(SMALL, None, {"DeepGEMM": 150.0})]).pairs == []


@pytest.mark.parametrize(("limit", "outside"), [(0.02, 2), (0.05, 1), (0.2, 0)])
def test_the_limit_counts_both_ways(limit, outside):
    first, second = runs()
    for pair in ((first, second), (second, first)):
        assert len(comparison.compare(*pair, limit).outside) == outside


def test_without_results_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(RecordError, match="no results"):
        comparison.rows_of(tmp_path, "h200")


@pytest.mark.parametrize(("same", "code"), [(True, 0), (False, 1)])
def test_the_command_line_fails_beyond_the_limit(tmp_path, monkeypatch, same, code):
    monkeypatch.setenv("COLUMNS", "200")
    first, second = runs()
    results.merge_rows(results.rows_path(tmp_path / "one", "h200"), first)
    results.merge_rows(tmp_path / "two.json", first if same else second)
    result = CliRunner().invoke(cli.app, ["report", "--compare", str(tmp_path / "one"), str(tmp_path / "two.json")])
    assert result.exit_code == code, result.output
    assert ("-10.0 %" in result.output) is not same


HEADLINE = case("select", "normal", {"rows": 1, "context": 65536, "k": 2048})
MIDDLE = case("select", "normal", {"rows": 8, "context": 65536, "k": 2048})


def committed():
    """Rows of three selections: the headline, one in the middle, and the worst."""
    return [
        row(HEADLINE, 10.0, {"topk_v2": 20.0, "fast_topk": 30.0}),
        row(MIDDLE, 10.0, {"topk_v2": 15.0}),
        row(SELECT, 10.0, {"topk_v2": 5.0}),
    ]


def test_a_fresh_row_is_held_against_the_same_peer():
    fresh = [row(HEADLINE, 10.0, {"topk_v2": 20.2, "new": 9.0}), row(SELECT, 11.0, {"topk_v2": 5.0})]
    found = comparison.against(committed(), fresh)
    assert [round(pair.difference, 3) for pair in found.pairs] == [-0.091, 0.01], "the new peer changes nothing"
    assert [pair.key for pair in found.fallen] == [SELECT.key]


def test_no_time_has_fallen_and_no_peer_is_no_comparison():
    found = comparison.against(committed(), [row(HEADLINE, None, {"topk_v2": 20.0}), row(SELECT, 10.0, {"fast_topk": 6.0})])
    assert [(pair.key, pair.second) for pair in found.fallen] == [(HEADLINE.key, 0.0)]
    assert found.pairs[0].why == "failed: made up" and found.alone == ["select: 1 row of 8K: no time of topk_v2"]


def test_a_short_run_holds_headlines_and_the_worst():
    assert regression.short(committed()) == [HEADLINE, SELECT]
    assert regression.short(committed(), ["select"]) == [HEADLINE, SELECT]
    with pytest.raises(RecordError, match="bench --against all"):
        regression.short(committed(), ["layer_decode"])
    with pytest.raises(RecordError):
        regression.short([])


class Held:
    """A campaign whose rows are given, run after run."""

    def __init__(self, *runs):
        self.runs, self.asked = list(runs), []

    def run(self, cases, rebuild=True):
        self.asked.append((list(cases), rebuild))
        return self.runs.pop(0)


@pytest.mark.parametrize(("again", "fallen"), [(10.1, []), (11.0, [SELECT.key])])
def test_only_what_falls_twice_has_fallen(again, fallen):
    held = Held(
        [row(HEADLINE, 10.0, {"topk_v2": 20.0}), row(SELECT, 12.0, {"topk_v2": 5.0})], [row(SELECT, again, {"topk_v2": 5.0})]
    )
    found = regression.run(held, committed(), [HEADLINE, SELECT])
    assert [pair.key for pair in found.fallen] == fallen and len(found.pairs) == 2
    assert held.asked == [([HEADLINE, SELECT], True), ([SELECT], False)]


@pytest.mark.parametrize(("ours", "code"), [(10.0, 0), (9.0, 0), (10.6, 1)])
def test_the_command_line_is_a_speed_test(tmp_path, monkeypatch, ours, code):
    path = results.rows_path(tmp_path, "h200")
    results.merge_rows(path, committed())
    before = path.read_text()
    monkeypatch.setattr(gpu, "detect", lambda: H200)
    monkeypatch.setattr(Campaign, "run", lambda self, cases, rebuild=True: [row(SELECT, ours, {"topk_v2": 5.0})])
    result = CliRunner().invoke(cli.app, ["bench", "--check", "--stage", "select", "--out", str(tmp_path)])
    assert result.exit_code == code, result.output
    assert path.read_text() == before, "a speed test changes no row"


@pytest.mark.parametrize(("options", "wanted"), [([], {HEADLINE, SELECT}), (["--limit", "20"], {HEADLINE, MIDDLE, SELECT})])
def test_a_speed_test_can_be_made_longer(tmp_path, monkeypatch, options, wanted):
    results.merge_rows(results.rows_path(tmp_path, "h200"), committed())
    held = []
    monkeypatch.setattr(gpu, "detect", lambda: H200)
    monkeypatch.setattr(Campaign, "run", lambda self, cases, rebuild=True: held.extend(cases) or committed())
    result = CliRunner().invoke(cli.app, ["bench", "--check", "--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert set(held) == wanted


def test_nothing_to_compare_with_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "detect", lambda: H200)
    result = CliRunner().invoke(cli.app, ["bench", "--check", "--out", str(tmp_path)])
    assert isinstance(result.exception, RecordError)
