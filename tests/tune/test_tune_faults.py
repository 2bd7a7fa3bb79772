"""Faults: candidates that hang, crash, write out of bounds, are wrong, exhaust memory or poison; runs that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), str(TESTS.parent), *sys.path])}
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own test takes its place")


def python(code: str, *arguments: object, seconds: float = 900.0) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plant(folder: Path, wall_s: float) -> dict:
    """A run over the planted operation, every fault of which is to be found."""
    return json.loads(python("import planted; planted.main()", folder, 3, wall_s).splitlines()[-1])


REPEATED = """
import json, sys, planted
planted.arrange(3.0)
seen = [planted.repeating.again(name, planted.target()) for name in sys.argv[1:]]
print(json.dumps([[each.before.value, each.now.kind.value, each.config["fault"]] for each in seen]))
"""


def every_fault_is_found(folder: Path, kinds: Sequence[str]) -> None:
    """Each fault is counted by its kind, none is chosen, and these can be seen again by what the run printed."""
    told = plant(folder, 400)
    expected = json.loads(python("import json, planted; print(json.dumps(planted.EXPECTED))"))
    assert told["counts"] == {"ok": 8, **dict.fromkeys(expected.values(), 1)}
    (config,) = told["config"]
    assert config["fault"] == "none"
    assert told["elapsed_s"] < 400, "whatever hangs"
    shown = [failure["again"] for failure in told["failures"] if failure["kind"] in kinds]
    again = json.loads(python(REPEATED, *shown))
    assert sorted(was for was, _, _ in again) == sorted(now for _, now, _ in again) == sorted(kinds)
    assert {(fault, now) for _, now, fault in again} <= expected.items()


@WITHOUT_GPU
@pytest.mark.slow
def test_every_fault_is_found(tmp_path):
    every_fault_is_found(tmp_path, ["out_of_bounds", "mismatch", "out_of_memory"])


@pytest.mark.gpu
def test_every_fault_is_found_on_the_gpu(tmp_path):
    every_fault_is_found(tmp_path, ["context_lost"])


def killed(kind: str, folder: Path, times: int, candidates: int, seed: int = 7) -> None:
    """A run that was killed so often goes on: nothing told is tried again, nothing is left running."""
    python("import killed; killed.main()", kind, folder, times, 0.1, seed)
    told = json.loads((folder / "report").read_text())
    assert (told["evaluated"], len(told["records"])) == (candidates, 1)
    begun = [line.split(maxsplit=1) for line in (folder / "log").read_text().splitlines()]
    tried = Counter(config for _, config in begun)
    assert candidates <= len(tried)
    assert sum(tried.values()) <= candidates + times, "a kill costs what was under way, no more"
    end = time.monotonic() + 5
    while (left := [pid for pid, _ in begun if Path("/proc", pid).exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


@pytest.mark.slow
def test_ten_kills_cost_no_more_than_what_was_under_way(tmp_path):
    killed("fake", tmp_path, 10, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [7, 8])
def test_ten_kills_on_the_gpu(tmp_path, seed):
    """Five moments of each of two runs, which may go beside each other: most of a life is the start of its processes."""
    killed("planted", tmp_path, 5, 14, seed)
