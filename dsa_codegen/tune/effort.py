"""Effort: how much a tuning run may spend and on what; quick keeps to what a model needs most and has no record of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UnknownName
from ..problem.values import Spec
from .plan import OFFLINE, ON_GPU, Budget
from .problem import Problem

_LEAST = 0.02  # of the dearest call's roofline: what a step does not notice is left to defaults


@dataclass(frozen=True)
class Effort:
    """A budget for each way of judging candidates, and whether only the most needed is searched."""

    name: str
    on_gpu: Budget
    offline: Budget
    narrow: bool = False
    """One call of each spec, in the backends that serve it or its neighbours."""

    def budget(self, offline: bool) -> Budget:
        """Its budget without or with a GPU."""
        return self.offline if offline else self.on_gpu


_MINUTE = 48.0  # s of a command that takes one: to import, to open the studies and to end took another 10 on an H200's host

QUICK = Effort("quick", Budget(_MINUTE, 12), Budget(_MINUTE, 8), narrow=True)
NORMAL = Effort("normal", ON_GPU, OFFLINE)
THOROUGH = Effort("thorough", Budget(3600.0, 200), Budget(1200.0, 100))
EFFORTS = {effort.name: effort for effort in (QUICK, NORMAL, THOROUGH)}


def effort(name: str) -> Effort:
    """The effort of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in EFFORTS:
        raise UnknownName("effort", name, EFFORTS)
    return EFFORTS[name]


def most_needed(problems: Sequence[Problem], served: Callable[[Problem], bool]) -> list[Problem]:
    """Of each spec the dearest call, by its roofline, that no record serves (of all, where each is served), dearest first.

    Calls below a fiftieth of the dearest are left out.
    """
    cost = {problem.id: problem.op.cost(problem.spec, problem.case).limit_us(problem.gpu) for problem in problems}
    waiting = [problem for problem in problems if not served(problem)] or list(problems)
    dearest: dict[tuple[str, Spec], Problem] = {}
    for problem in sorted(waiting, key=lambda problem: -cost[problem.id]):
        dearest.setdefault((problem.op.name, problem.spec), problem)
    least = _LEAST * max((cost[problem.id] for problem in dearest.values()), default=0.0)
    return [problem for problem in dearest.values() if cost[problem.id] >= least]
