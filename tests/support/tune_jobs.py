"""Jobs of the worker processes in tests: functions that a spawned child imports by name, without torch or a GPU."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

from dsa_codegen.kernels.backends.base import Resources
from dsa_codegen.kernels.build import Built
from dsa_codegen.problem.op import Accuracy, Config
from dsa_codegen.proof.timing import COLD, Timing
from dsa_codegen.tune.outcome import Kind, Outcome

PASSED = Accuracy(True, 1e-6, 1e-9)


def landscape(choice: Config) -> float:
    """Microseconds with one optimum, at block_q 2, block_n 128, num_warps 4, num_stages 4, splits 2."""
    best = {"block_q": 2, "block_n": 128, "num_warps": 4, "num_stages": 4, "splits": 2}
    return 100 * math.prod(1 + 0.15 * abs(math.log2(choice[name] / value)) for name, value in best.items())


def timed(microseconds: float, spread: float = 0.001) -> Outcome:
    """An OK outcome."""
    timing = Timing(microseconds, microseconds * (1 - spread), microseconds * (1 + spread), 5)
    return Outcome(Kind.OK, timing, COLD, PASSED, smem=1024)


def load() -> None:
    """Nothing is imported for all."""


def compile_quickly(rendered, gpu) -> Built:
    """A build without a compiler; a block_n of 256 does not compile, hangs or kills, by its number of stages."""
    if "BLOCK_N = tl.constexpr(256)" in rendered.text:
        stages = rendered.text.split("STAGES = tl.constexpr(")[1][0]
        {"2": _raise, "3": _hang, "4": _die}.get(stages, lambda: None)()
    return compile_well(rendered, gpu)


def compile_well(rendered, gpu) -> Built:
    """A build without a compiler, whatever the source."""
    folder = Path(os.environ["DSA_CACHE_DIR"]) / rendered.sha[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return Built(rendered, gpu, folder, {"indexer": Resources(128, 0, 1024, 128)})


def compile_together(rendered, gpu) -> Built:
    """Compiles when another compiler is at work beside it."""
    _meet(Path(os.environ["DSA_CACHE_DIR"]), f"compiler-{os.getpid()}")
    return compile_well(rendered, gpu)


def _meet(folder: Path, name: str) -> None:
    """Wait for a second of the same kind."""
    (folder / name).touch()
    end = time.monotonic() + 60
    while len(list(folder.glob(f"{name.partition('-')[0]}-*"))) < 2:
        if time.monotonic() > end:
            raise RuntimeError("nobody came")
        time.sleep(0.01)


def evaluate_together(problem, entrant, best_us) -> Outcome:
    """As ``evaluate``, when another device is at work beside it."""
    _meet(Path(os.environ["TUNE_TEST_FOLDER"]), f"device-{os.environ['CUDA_VISIBLE_DEVICES']}")
    return evaluate(problem, entrant, best_us)


def final_somewhere(problem, entrants, limit_s) -> list[SimpleNamespace]:
    """As ``final``; notes on which device."""
    Path(os.environ["TUNE_TEST_FOLDER"], f"final-{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    return final(problem, entrants, limit_s)


def prepare(problem, backend) -> None:
    """Nothing to prepare."""


def evaluate(problem, entrant, best_us) -> Outcome:
    """Misbehaves by the number of splits where block_q is 1, else the landscape's time."""
    if entrant.config["block_q"] == 1:
        {1: _raise, 2: _hang, 4: _die, 8: _poison}[entrant.config["splits"]]()
    return timed(landscape(entrant.config))


def gate(problem, entrant) -> Outcome:
    """Misbehaves as ``evaluate`` does, and takes no time."""
    return Outcome(evaluate(problem, entrant, None).kind, accuracy=PASSED, smem=1024)


def final(problem, entrants, limit_s) -> list[SimpleNamespace]:
    """The landscape's times, as a final would give them."""
    return [SimpleNamespace(timing=timed(landscape(entrant.config)).timing, policy=COLD, sets=1) for entrant in entrants]


def eager(problem, entrants) -> list[Timing]:
    """Ten microseconds of a host on top."""
    return [timed(landscape(entrant.config) + 10).timing for entrant in entrants]


def card() -> str:
    """A name."""
    return "a board"


def recheck(problem, entrant) -> Accuracy:
    """Always right."""
    return PASSED


def prepare_badly(problem, backend) -> None:
    """A problem whose inputs do not fit the GPU."""
    raise MemoryError("no room for the inputs")


def _raise() -> None:
    raise RuntimeError("out of resource: shared memory")


def _poison() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _hang() -> None:
    time.sleep(600)


def _die() -> None:
    os._exit(11)
