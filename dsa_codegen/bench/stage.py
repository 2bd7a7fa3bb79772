"""Stage: what the benchmark must know of a step of sparse attention to time anybody's implementation of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..gpu import Gpu
from ..problem.draw import Draw
from ..problem.op import Accuracy, Case, Cost, Inputs, Op, Outputs
from ..problem.values import Sizes, Spec
from ..runtime.dispatch import chosen
from .cases import BenchCase

Run = Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One operation of this package that a stage calls."""

    op: Op
    spec: Spec
    case: Case

    @property
    def sizes(self) -> Sizes:
        """What decides which record serves it."""
        return self.case.sizes


@dataclass(frozen=True)
class Prepared:
    """Somebody's implementation, ready to be called on one set of inputs."""

    label: str
    run: Run
    """One call on the current stream; whatever could be made beforehand has been."""
    outputs: Callable[[Any], Outputs]
    """What ``run`` returned, by the names that the stage's check knows; only what the implementation does give."""


class Stage(ABC):
    """One stage. Stateless; inputs are those of the operations, by their names."""

    name: str

    @abstractmethod
    def parts(self, case: BenchCase) -> Sequence[Part]:
        """The operations in order, as the dispatcher is asked for them."""

    @abstractmethod
    def inputs(self, case: BenchCase, draw: Draw) -> Inputs:
        """Fresh random inputs."""

    @abstractmethod
    def ours(self, case: BenchCase, inputs: Inputs) -> Prepared:
        """This package's public functions."""

    @abstractmethod
    def reference(self, case: BenchCase, inputs: Inputs) -> Outputs:
        """What outputs are compared with."""

    @abstractmethod
    def check(self, case: BenchCase, inputs: Inputs, outputs: Outputs, reference: Outputs, exact: bool) -> Accuracy:
        """Compare.

        Args:
            exact: the outputs are ours, which must keep this package's promises; a peer may break ties as it likes.
        """

    def helpers(self, case: BenchCase) -> Sequence[Part]:
        """Further operations of this package that a case calls, to make inputs or in smaller portions: to be built ahead."""
        return ()

    def costs(self, case: BenchCase) -> Sequence[Cost]:
        """What the stage's parts need at least, were all of them fused into one."""
        return [part.op.cost(part.spec, part.case) for part in self.parts(case)]

    def variant(self, case: BenchCase, gpu: Gpu) -> str:
        """The configs that the dispatcher uses and where they come from: ``triton(…) [tuned]``."""
        found = [chosen(part.op, part.spec, part.sizes, gpu) for part in self.parts(case)]
        return " + ".join(f"{each.config} [{each.origin}]" for each in found)


def moved(costs: Sequence[Cost]) -> int:
    """Least bytes of all parts."""
    return int(sum(cost.bytes for cost in costs))
