"""What hosts of a test's cluster judge by: a sweep's times, at a pace that leaves time to take a host away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from dsa_codegen.gpu import Gpu
from dsa_codegen.tune import sweep as sweeps
from dsa_codegen.tune.evaluate import Evaluator, Task
from dsa_codegen.tune.outcome import Outcome
from dsa_codegen.tune.replay import Clock, ReplayEvaluator


class Paced(ReplayEvaluator):
    """Every candidate takes a while, and a line says which host judged it."""

    def __init__(self, sweep, log: Path, pace_s: float) -> None:
        super().__init__(sweep, 0, Clock())
        self._log, self._pace_s = log, pace_s

    def _judge(self, task: Task) -> Outcome:
        with self._log.open("a") as file:
            host = ray.get_runtime_context().get_node_id()
            file.write(f"{host} {task.problem.case.id} {task.candidate.rendered.sha}\n")
        time.sleep(self._pace_s)
        return super()._judge(task)


@dataclass(frozen=True)
class Replays:
    """Opens what judges by the cases of a sweep."""

    path: Path
    log: Path
    pace_s: float = 0.05

    def __call__(self, gpu: Gpu):
        """A host's evaluator."""
        return self._open()

    @contextmanager
    def _open(self) -> Iterator[Evaluator]:
        yield Paced(sweeps.read(self.path), self.log, self.pace_s)
