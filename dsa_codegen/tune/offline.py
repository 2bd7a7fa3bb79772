"""Offline: judges compiled candidates by the model, for a GPU that is not here."""

from __future__ import annotations

from ..proof.timing import Timing
from . import ranking
from .evaluate import Done, Evaluator, Task
from .outcome import Kind, Outcome


class ModelEvaluator(Evaluator):
    """One compilation serves every size bucket: judging it for one more takes milliseconds."""

    method = f"modelled-{ranking.VERSION}"
    search_share = 0.97
    measures = False
    free = True

    def _advance(self) -> list[Done]:
        ready, self._ready = self._ready, []
        return [Done(task, self._judge(task), self._compile_cost(task)) for task in ready]

    def _judge(self, task: Task) -> Outcome:
        problem, built = task.problem, self.built(task.candidate)
        microseconds = self.estimate_us(problem, task.candidate)
        smem = max(usage.smem for usage in built.resources.values())
        if microseconds == float("inf"):
            return Outcome(Kind.LAUNCH_ERROR, smem=smem, detail=f"a block does not fit an SM of {problem.gpu.name}")
        return Outcome(Kind.OK, Timing.modelled(microseconds), smem=smem)
