"""What every test file shares: a child process that interprets Triton, an isolated build cache, the GPU marker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsa_codegen.runtime import dispatch
from dsa_codegen.worker import Worker


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Under ``-n``, stretches of the list that are cut anew where one is done: a module's fixtures are made in one process."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share out a run share out the cores: threads that waited for each other took twice the time."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if workers:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of child processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes share which share out a run (``-n``)."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def build_cache(of_the_run: Path) -> Iterator[Path]:
    """A build cache of this run's own, so that nothing of the user's is read or written; or the one in DSA_TEST_CACHE."""
    folder = Path(os.environ.get("DSA_TEST_CACHE") or of_the_run / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_CACHE_DIR", str(folder))
        patch.delenv("DSA_TUNED_DIR", raising=False)
        patch.delenv("DSA_BUILDS", raising=False)
        yield folder


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Worker]:
    """A worker in which Triton kernels run on the CPU."""
    with Worker({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}) as worker:
        yield worker


@pytest.fixture
def fresh_dispatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A dispatcher that knows nothing yet, whatever tuned/ holds, and forgets what the test made it load."""
    monkeypatch.setattr("dsa_codegen.paths.shipped_records", lambda: tmp_path)
    dispatch.reset()
    yield
    dispatch.reset()
