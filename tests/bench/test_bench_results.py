"""Results: rows are merged by problem, older ones stay with their commit, and no file is ever damaged."""

from __future__ import annotations

import json

import pytest

from dsa_codegen.bench import command, results
from dsa_codegen.bench.cases import case
from dsa_codegen.errors import RecordError

from bench_support import SMALL, made_up_folder, row

OTHER = case("select", "normal", {"rows": 1, "context": 8192, "k": 2048})


def test_a_row_has_the_fields_that_readers_expect():
    written = row(SMALL, 5.0, {"DeepGEMM": 6.0})
    assert tuple(name for name in written if name in results.REQUIRED) == results.REQUIRED
    assert written["shape"] == {"queries": 16, "context": 64, "heads": 8, "head_dim": 64}
    assert (written["best_peer"], written["ratio"]) == ("DeepGEMM", 1.2)
    assert json.loads(json.dumps(written)) == written


def test_merging_keeps_what_was_not_measured_again(tmp_path):
    path = results.rows_path(tmp_path, "h200")
    results.merge_rows(path, [row(SMALL, 5.0, {}, commit="old"), row(OTHER, 7.0, {}, commit="old")])
    results.merge_rows(path, [row(OTHER, 6.0, {}, commit="new")])
    found = {each["stage"]: (each["ours_us"], each["commit"]) for each in results.read_rows(path)}
    assert found == {"indexer_prefill": (5.0, "old"), "select": (6.0, "new")}


def test_a_problem_is_its_stage_shape_and_distribution(tmp_path):
    relu = case("select", "relu", dict(OTHER.shape))
    assert results.key_of(row(OTHER, 1.0, {})) == OTHER.key != relu.key
    assert len(results.merge_rows(tmp_path / "rows.json", [row(OTHER, 1.0, {}), row(relu, 1.0, {})])) == 2


def test_the_file_is_one_list_with_a_line_per_row(tmp_path):
    path = results.rows_path(made_up_folder(tmp_path), "h200")
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert len(json.loads(path.read_text())) == len(lines) - 2


@pytest.mark.parametrize(
    "content", ["{", '{"stage": 1}', '[{"stage": "select"}]', "[1]"], ids=["broken", "object", "partial", "numbers"]
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(RecordError):
        results.merge_rows(path, [row(SMALL, 5.0, {})])
    assert path.read_text() == content


def test_machine_facts_are_kept_beside(tmp_path):
    path = results.machine_path(tmp_path, "h200")
    results.merge_machine(path, {"ceilings": {"copy_tb_s": 4.0}})
    results.merge_machine(path, {"host": {"rows": []}})
    assert results.read_machine(path) == {"ceilings": {"copy_tb_s": 4.0}, "host": {"rows": []}}
    assert results.read_machine(tmp_path / "absent.json") == {}


def test_results_of_another_machine_are_taken_over(tmp_path):
    there, here = made_up_folder(tmp_path / "there"), tmp_path / "here"
    results.merge_rows(results.rows_path(here, "h200"), [row(SMALL, 5.0, {}, commit="old")])
    taken = command.merge(there, here)
    assert len(results.read_rows(results.rows_path(here, "h200"))) == len(taken) + 1
    assert results.read_machine(results.machine_path(here, "h200"))["ceilings"]["bf16_tflops"] == 699.0


def test_the_commit_can_be_named(monkeypatch):
    monkeypatch.setenv("DSA_COMMIT", "1234567")
    assert results.commit() == "1234567"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.delenv("DSA_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert results.commit() == "unknown"


def test_the_newest_row_decides_whose_figures_are_shown(tmp_path):
    results.merge_rows(results.rows_path(tmp_path, "h200"), [row(SMALL, 5.0, {}, date="2026-11-24T00:00:00Z")])
    results.merge_rows(results.rows_path(tmp_path, "h100"), [row(OTHER, 5.0, {}, date="2026-11-28T00:00:00Z")])
    assert results.latest_gpu(tmp_path) == "h100"
    results.merge_rows(results.rows_path(tmp_path, "h200"), [row(SMALL, 5.0, {}, date="2026-11-29T00:00:00Z")])
    assert results.latest_gpu(tmp_path) == "h200"
    with pytest.raises(RecordError, match="bench --against all"):
        results.latest_gpu(tmp_path / "elsewhere")
