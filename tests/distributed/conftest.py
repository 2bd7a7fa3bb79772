"""One group of processes computes every case of this folder, once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
