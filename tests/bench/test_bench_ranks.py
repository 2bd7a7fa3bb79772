"""Runs on several GPUs: every way is checked and noted, rows are rows of results, kernels are known beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsa_codegen.bench import results
from dsa_codegen.bench.ranks import command, model
from dsa_codegen.bench.ranks.cases import CASES, SMALL, Case
from dsa_codegen.bench.ranks.process import Timed
from dsa_codegen.bench.report import curves, page
from dsa_codegen.errors import NoGpu

from support import H200

FACTS = {"date": "2026-01-02T03:04:05Z", "commit": "abc1234", "toolchain": {}}
DECODE, PREFILL, _ = SMALL


def timed(name: str, us: float, sent: int = 8) -> Timed:
    return Timed(name, us, (us, us), sent, us / 10, us / 20, 1.0, 0.0, True)


def test_a_run_over_gloo_leaves_rows(tmp_path):
    """Two processes on the CPU: nothing is timed there, everything else is as on GPUs."""
    rows = command.run(H200, FACTS, tmp_path, SMALL[:1], device="cpu", devices=2)
    assert results.read_rows(results.rows_path(tmp_path, "h200x2")) == command.measured(tmp_path, "h200")
    assert {row["stage"] for row in rows} == {"decode_tensor", "decode_context", "decode_data"}
    by_stage = {row["stage"]: row for row in rows}
    choices = 4 * DECODE.batch // 2 * DECODE.shape["k"]
    assert by_stage["decode_tensor"]["sent_bytes"] == choices and not by_stage["decode_data"]["sent_bytes"]
    assert all(row["agreeing"] == 1 and row["similarity"] < 1e-4 for row in rows)
    assert results.gpus_in(tmp_path) == [] and results.groups_in(tmp_path) == ["h200x2"]


def test_rows_hold_one_gpu_and_the_plain_way():
    two = [(PREFILL, 2, timed("tensor, plain", 80.0)), (PREFILL, 2, timed("tensor", 55.0))]
    cut_short = (DECODE, 2, timed("tensor", 5.0))  # without a time of one GPU
    (row,) = command.rows_of([(PREFILL, 1, timed("one GPU", 100.0)), *two, cut_short], FACTS)
    assert all(name in row for name in results.REQUIRED)
    assert (row["stage"], row["shape"]["ranks"], row["best_peer"]) == ("prefill_tensor", 2, "plain")
    assert row["peers"] == {"one GPU": 100.0, "plain": 80.0} and row["limit_us"] == 50.0
    assert row["ratio"] == pytest.approx(80 / 55, abs=1e-4) and row["speedup"] == pytest.approx(100 / 55, abs=1e-4)


def test_the_report_draws_points_beside_the_model(tmp_path):
    big = Case("prefill", 131072)
    ways = [(big, 1, timed("one GPU", 100.0)), (big, 2, timed("context, plain", 80.0)), (big, 2, timed("context", 55.0))]
    results.merge_rows(results.rows_path(tmp_path, "h200x2"), command.rows_of(ways, FACTS))
    (section,) = page._several("h200", command.measured(tmp_path, "h200"))
    assert "on up to 2" in section["text"] and section["picture"].startswith("<svg")
    assert curves._measured(command.measured(tmp_path, "h200"), "prefill_context", 131072, "plain") == ([2], [1.25])
    assert not list(page._several("h100", command.measured(tmp_path, "h100")))


def test_groups_are_of_powers_of_two_and_of_all():
    assert [command.sizes_of(devices) for devices in (1, 2, 4, 6, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_kernels_of_every_rank_are_known_beforehand():
    ops = {rendered.op for rendered in command.kernels(CASES[:2], [1], H200)}
    paged = {"attention_paged", "indexer_paged", "quantize_paged", "resolve"}
    assert ops == {"attention", "indexer", "quantize", "select", *paged}


def test_one_gpu_is_not_several(tmp_path):
    with pytest.raises(NoGpu, match="two GPUs"):
        command.run(H200, FACTS, tmp_path, devices=1)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_page_holds_what_the_model_says():
    shown = PAGE.read_text().partition("<!-- model -->\n")[2].partition("\n<!-- /model -->")[0]
    assert shown == model.table()


@pytest.mark.parametrize("stage", model.WAYS)
def test_the_model_is_sane(stage):
    """One rank gains nothing, none gain more than there are, and ours is ahead of the plain way."""
    for way in model.WAYS[stage]:
        for context in (32768, 131072):
            assert model.speedup(stage, way, context, 1) == 1
            assert all(0 < model.speedup(stage, way, context, world) <= world for world in model.WORLDS)
    for way in model.WAYS[stage]:
        if f"{way}, plain" in model.WAYS[stage]:
            assert model.speedup(stage, way, 131072, 8) > model.speedup(stage, f"{way}, plain", 131072, 8)
