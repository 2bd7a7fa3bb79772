"""What tests of several ranks share: one group of processes that computes every case, once a run, and a look at a warmup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsa_codegen.runtime import dispatch

import ranks

PROCESSES = 4


@pytest.fixture(scope="session")
def results(of_the_run: Path) -> dict[int, list[dict]]:
    """World -> the results of each rank over gloo; world 1 is one rank alone."""
    return ranks.computed(of_the_run / "ranks", PROCESSES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for each other took three times as long on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def covers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], Callable[[], object]], None]:
    """Checks that a warmup names every operation, spec and bucket that is called behind it."""

    def check(warm: Callable[[], object], run: Callable[[], object]) -> None:
        called, warmed, call = set(), set(), dispatch.call

        def watched(op, args, sms=None):
            args = list(args)
            spec, sizes, _ = op.bind(*args)
            called.add((op.name, spec, sizes.bucket()))
            return call(op, args, sms)

        def noted(wanted, processes):
            warmed.update((op.name, spec, sizes.bucket()) for op, spec, sizes in wanted)

        monkeypatch.setattr(dispatch, "warmup", noted)
        warm()
        monkeypatch.setattr(dispatch, "call", watched)
        run()
        assert {name for name, *_ in called} >= {"indexer", "select", "attention", "attention_paged", "indexer_paged"}
        assert called <= warmed, called - warmed

    return check
