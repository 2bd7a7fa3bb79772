"""Two runs beside each other: what differs most comes first, and more than five per cent is a failure."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import cli
from dsa_codegen.bench import comparison, results
from dsa_codegen.bench.cases import case
from dsa_codegen.errors import RecordError

from bench_support import SMALL, row

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
