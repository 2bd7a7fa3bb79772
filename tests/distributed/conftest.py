"""One group of processes computes every case of this folder, once."""

from __future__ import annotations

import pytest

import ranks

PROCESSES = 4


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """World -> the results of each rank over gloo; world 1 is one rank alone."""
    return ranks.launch(tmp_path_factory.mktemp("ranks"), PROCESSES)
