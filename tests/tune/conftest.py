"""What tests of whole tuning runs share: a run whose evaluator needs no GPU, and what it writes."""

from __future__ import annotations

import pytest

from dsa_codegen.tune import opening, standing
from dsa_codegen.tune import run as room
from dsa_codegen.tune.plan import Budget
from dsa_codegen.tune.run import tune

from support import H200
from toy import OP
from tune_support import CASE, SPEC, TRIALS, InstantGpu


@pytest.fixture
def one_bucket(monkeypatch):
    """The indexer as if it were served at one size only."""
    monkeypatch.setattr(type(OP), "workloads", lambda self, spec: [CASE])


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run with an evaluator that needs no GPU; returns the report."""

    monkeypatch.setattr(standing, "all_ops", lambda: {OP.name: OP})
    monkeypatch.setattr(room, "search_path", dict)
    monkeypatch.setattr(opening, "search_path", dict)  # the shipped records of such kernels are not at stake

    def run(evaluator=None, **options):
        monkeypatch.setattr(room, "GpuEvaluator", lambda pool, **how: evaluator or InstantGpu(folder=tmp_path / "builds"))
        options = {"budget": Budget(60.0, TRIALS), "state": tmp_path / ".tune", **options}
        return tune([(OP, SPEC)], options.pop("gpu", H200), tmp_path / "tuned", **options)

    return run
