"""One command runs all that is stated of several GPUs; here over gloo, as on a host with eight of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen.bench.ranks.cases import CASES, Case, groups, served
from dsa_codegen.proof.timing import Timing
from dsa_codegen.records.files import read
from dsa_codegen.records.record import Record

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "several_gpus.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("several_gpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record() -> Record:
    found = next(record for record in read(ROOT / "tuned" / "h200" / "indexer.json") if record.backend == "triton")
    return dataclasses.replace(found, time_us=Timing(100.0, 99.9, 100.1, 50))


def of(record: Record, us: float, **config) -> Record:
    timing = Timing(us, us * 0.999, us * 1.001, 50)
    return dataclasses.replace(record, time_us=timing, config={**record.config, **config})


def test_winners_are_the_same_or_tied_or_apart(script, record):
    other = {"num_warps": 2 * record.config["num_warps"]}
    assert script.agreement([record], [of(record, 120.0)]) == {"same": 1, "tied": 0, "apart": []}
    assert script.agreement([record], [of(record, 100.9, **other)])["tied"] == 1
    assert script.agreement([record], [of(record, 99.2, **other)])["tied"] == 1
    (apart,) = script.agreement([record], [of(record, 101.5, **other)])["apart"]
    assert apart["op"] == "indexer" and apart["time_us"] == [100.0, 101.5]
    assert script.agreement([record], []) == {"same": 0, "tied": 0, "apart": []}


def test_a_million_tokens_are_for_eight_gpus_and_for_one_in_stretches():
    (million,) = (case for case in CASES if case.context == 1 << 20)
    assert million not in served(CASES, 4) and million in served(CASES, 8)
    assert groups(million, [1, 2, 4, 8]) == [1, 8]
    assert groups(Case("prefill", 32768), [1, 2, 4, 8]) == [1, 2, 4, 8]


@pytest.mark.slow
def test_one_command_runs_it_all_on_eight_processes(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cpu", "8", "--out", tmp_path], capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "several.json").read_text())
    rows = {(row["stage"], row["shape"]["context"], row["shape"]["ranks"]): row for row in found["layer"]}
    of_eight = {(stage, context) for stage, context, ranks in rows if ranks == 8}
    ways = {("decode_tensor", 256), ("decode_context", 256), ("decode_data", 256)}
    assert of_eight == ways | {(f"prefill_{way}", context) for way in ("tensor", "context") for context in (200, 320)}
    assert all(row["agreeing"] == 1 and row["similarity"] < 1e-4 and row["predicted"] > 0 for row in rows.values())
    assert {path.name for path in (tmp_path / "results").glob("*.json")} == {f"h100x{count}.json" for count in (2, 4, 8)}
    assert (tmp_path / "several.svg").read_text().count("<svg") == 1


def test_what_was_timed_before_the_end_is_kept(script, tmp_path, monkeypatch):
    def cut_short(*arguments):
        raise script.command.RunFailed(3, 1)

    row = {"stage": "prefill_context", "shape": {"context": 32768, "ranks": 2}, "ours_us": 20.5, "peers": {"one GPU": 39.0}}
    monkeypatch.setattr(script.command, "run", cut_short)
    monkeypatch.setattr(script.command, "measured", lambda folder, gpu: [row])
    (kept,) = script.layer(script.gpus.resolve("h200"), {"date": "", "commit": ""}, tmp_path, 8, on_cpu=True)
    assert kept == {**row, "predicted": 1.99} and (tmp_path / "several.svg").exists()
