"""Every example runs as it stands, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import script

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = os.pathsep.join([str(ROOT), *sys.path])  # compilers may lie anywhere
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TRAINING = ROOT / "examples/train_indexer.py"


def test_there_are_examples():
    assert EXAMPLES


def skip_without_what_it_shows(path):
    if "transformers" in path.stem:
        pytest.importorskip("transformers", "5.17", reason="transformers 5.17 or newer is not installed")


@pytest.mark.parametrize("path", [each for each in EXAMPLES if each != TRAINING], ids=lambda path: path.stem)
def test_an_example_runs(path):
    skip_without_what_it_shows(path)
    shown = script(path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout


def trained(*arguments, **environment):
    """What the training example says came of it."""
    command = [sys.executable, TRAINING, *arguments]
    environment = {**os.environ, "PYTHONPATH": PACKAGES, **environment}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_smallest_model_learns_in_every_stage(seed):
    """Who found the keys' earlier places has a loss below 0.4, guessing a value costs 2.1; half of the tokens are chosen."""
    found = trained("tiny", "cpu", "--seed", str(seed), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert found["dense loss"] < 0.4
    assert abs(found["sparse loss"] - found["dense loss"]) <= 0.05
    assert found["untrained recall"] < 0.8
    assert found["fitted recall"] >= 0.88 and found["recall after sparse training"] >= 0.88


@pytest.mark.gpu
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_on_a_gpu(path):
    skip_without_what_it_shows(path)
    arguments = [sys.executable, path, "tiny", "cuda"]
    shown = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGES},
        timeout=600,
    )
    assert shown.returncode == 0, shown.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_indexer_learns_what_the_attention_looks_at(seed):
    """The fitted indexer finds the mass that the untrained one does not; sparse loses nothing on dense."""
    found = trained("small", "cuda", "--seed", str(seed))
    assert found["dense loss"] < 0.5
    assert found["fitted recall"] >= 0.9 and found["recall after sparse training"] >= 0.9
    assert found["untrained recall"] <= 0.5
    assert abs(found["sparse loss"] - found["dense loss"]) <= 0.05
