"""Jobs of a sweep's process in tests, without a GPU: the landscape's times, and configs that fail."""

from __future__ import annotations

from pathlib import Path

from dsa_codegen.kernels.anatomy import Anatomy, Dissected
from dsa_codegen.kernels.backends import Resources
from dsa_codegen.tune.outcome import Kind, Outcome

from tune_jobs import landscape

_entered: dict = {}


def compile_quickly(rendered, gpu) -> Dissected:
    """A build without a compiler."""
    anatomies = {"indexer": Anatomy(({"mma": 1}, {"integer": 7}), 1)}
    return Dissected(rendered, gpu, Path(), {"indexer": Resources(128, 0, 1024, 128)}, anatomies)


def fails(config) -> bool:
    """Four configs of the space."""
    return (config["block_q"], config["block_n"], config["num_warps"], config["num_stages"]) == (2, 64, 4, 2)


def prepare(problem, backend) -> None:
    """Nothing to prepare."""


def enter(problem, entrant) -> Outcome:
    """Right, but where ``fails``: then it poisons its process, or is wrong."""
    if fails(entrant.config):
        if entrant.config["splits"] == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Outcome(Kind.MISMATCH)
    _entered[entrant.candidate.key] = entrant.config
    return Outcome(Kind.OK)


def visit(keys) -> list[float]:
    """The landscape's times."""
    return [landscape(_entered[key]) for key in keys]


def leave() -> None:
    """Forget."""
    _entered.clear()
