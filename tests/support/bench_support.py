"""Made-up results and stand-ins for the benchmark's tests: nothing here was measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa_codegen.bench import results
from dsa_codegen.bench.cases import BenchCase, all_cases, case
from dsa_codegen.bench.contest import OURS, Entry, Outcome
from dsa_codegen.bench.problems import Roofs, stage_of
from dsa_codegen.bench.summary import summarise
from dsa_codegen.proof.timing import Timing

from support import H200

SHEET = Roofs.of_datasheet(H200)
FACTS = {"date": "2026-01-02T03:04:05Z", "commit": "abc1234", "toolchain": {"torch": "2.11.0", "triton": "3.6.0"}}
SMALL = case("indexer_prefill", "causal", {"queries": 16, "context": 64, "heads": 8, "head_dim": 64})
PEERS = {
    "indexer": "DeepGEMM",
    "select": "fast_topk",
    "index": "DeepGEMM + fast_topk",
    "attention": "FlashMLA",
    "gqa": "PyTorch (gathered, SDPA)",
    "model": "PyTorch (gathered latents)",
    "layer": "DeepGEMM + fast_topk + FlashMLA",
    "engine": "DeepGEMM + fast_topk + FlashMLA",
}
PROLOGUE = "PyTorch (unfused)"


def peer_of(stage: str) -> str:
    """The peer that a made-up row is given."""
    if stage.endswith("_prologue"):
        return PROLOGUE
    return PEERS["index" if stage.startswith("index_") else stage.split("_")[0]]


def timing(microseconds: float) -> Timing:
    """Three samples that agree."""
    return Timing(microseconds, microseconds, microseconds, 3)


def row(
    case_: BenchCase, ours: float | None, peers: dict[str, float], notes: dict[str, str] | None = None, **facts: Any
) -> results.Row:
    """A row as a run would write it."""
    entries = [Entry(OURS, timing(ours), similarity=1e-7) if ours else Entry(OURS, note="failed: made up")]
    entries += [Entry(name, timing(us), similarity=2e-7) for name, us in peers.items()]
    entries += [Entry(name, note=note) for name, note in (notes or {}).items()]
    outcome = Outcome(tuple(entries), "triton(block_n=64) [tuned]", 4, True)
    return results.row_of(case_, summarise(case_, outcome, SHEET), {**FACTS, **facts})


def made_up_rows(cases: Sequence[BenchCase] | None = None, seed: int = 0) -> list[results.Row]:
    """Rows of every case with plausible times; some without a peer, one without a time of ours."""
    draw = random.Random(seed)
    rows = []
    for number, each in enumerate(cases or all_cases()):
        ours = 2 + SHEET.limit_us(stage_of(each.stage).costs(each)) * draw.uniform(1.2, 2.5)
        name = peer_of(each.stage)
        served = dict(each.shape).get("heads", 64) >= 32
        peers = {name: ours * draw.uniform(0.8, 2.6)} if served else {}
        if each.stage == "select":
            peers["torch.topk"] = ours * draw.uniform(3, 9)
        rows.append(row(each, None if number == 40 else ours, peers, {} if served else {name: "does not serve 8 heads"}))
    return rows


def made_up_machine() -> dict[str, Any]:
    """Ceilings, host costs and a sweep of contexts."""
    contexts = [1 << n for n in range(12, 21)]
    sweep = [
        {"context": c, "method": method, "us": us, "bytes": size, "note": ""}
        for c in contexts
        for method, us, size in (
            ("dense", 0.16 * c + 60, 21e3 * c),
            ("window", 520.0, 1.2e3 * c + 4e8),
            ("sparse", 900 + 0.02 * c, 1.4e3 * c + min(1 << 30, 4096 * c) + 4e8),
        )
    ]
    host = [
        {"name": "torch add_", "what": "plain", "host_us": 7.0, "graph_us": 1.0, "note": ""},
        {"name": "ours: public function", "what": "select", "host_us": 8.5, "graph_us": 5.2, "note": "", "add_us": 6.8},
        {"name": "fast_topk", "what": "select", "host_us": 8.1, "graph_us": 8.7, "note": ""},
        {"name": "FlashInfer", "what": "select", "host_us": None, "graph_us": None, "note": "flashinfer is not installed"},
    ]
    ceilings = {"copy_tb_s": 4.27, "bf16_tflops": 699.0, "fp8_tflops": 1262.0}
    return {"ceilings": ceilings, "host": {"rows": host, **FACTS}, "context": {"rows": sweep, **FACTS}}


def made_up_histories() -> list[dict[str, Any]]:
    """Studies that get better, slower and slower."""
    draw = random.Random(1)
    names = (
        "indexer triton",
        "indexer_paged triton",
        "select tilelang",
        "select triton",
        "attention tilelang",
        "attention_paged triton",
    )
    shares = {"num_stages": 0.6, "block_n": 0.3, "splits": 0.1}
    return [{"name": name, "times_us": [100 * draw.uniform(1, 2.2) for _ in range(48)], "importance": shares} for name in names]


def made_up_folder(folder: Path) -> Path:
    """A benchmarks folder full of made-up results."""
    results.merge_rows(results.rows_path(folder, "h200"), made_up_rows())
    results.merge_machine(results.machine_path(folder, "h200"), made_up_machine())
    return folder
