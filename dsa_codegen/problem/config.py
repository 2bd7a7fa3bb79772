"""Config: one point of an operation's search space, the parameters that span it, and the constraints that it may break."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownName
from .values import Scalar


@dataclass(frozen=True)
class Parameter:
    """One tuning parameter: its name (the same in template, search space, JSON and docs) and its ordered choices."""

    name: str
    choices: tuple[Scalar, ...]
    meaning: str
    launch_only: bool = False
    """True where only the launch depends on it (a number of splits, say): configs that differ in it share one build."""
    before: Scalar | None = None
    """What it is in records that are older than the parameter; None where there are none."""


@dataclass(frozen=True)
class Config:
    """One point of a search space: a backend and a value for each of its parameters."""

    backend: str
    values: tuple[tuple[str, Scalar], ...]

    @classmethod
    def of(cls, backend: str, **values: Scalar) -> Config:
        """``Config.of("triton", block_n=64, num_warps=4)``; the order of the keywords does not matter."""
        return cls(backend, tuple(sorted(values.items())))

    def __getitem__(self, name: str) -> Any:
        for key, value in self.values:
            if key == name:
                return value
        raise UnknownName("tuning parameter", name, (key for key, _ in self.values))

    def replace(self, **changes: Scalar) -> Config:
        """A copy with some values changed."""
        return Config.of(self.backend, **{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Scalar]:
        """The values by parameter name."""
        return dict(self.values)

    def __str__(self) -> str:
        return f"{self.backend}({', '.join(f'{name}={value}' for name, value in self.values)})"


@dataclass(frozen=True)
class Violation:
    """A constraint that a config breaks: ``excess`` > 0 says by how much (limit exceeded by that share)."""

    name: str
    excess: float
    reason: str


def exceeds(name: str, need: float, limit: float, unit: str = "") -> Iterable[Violation]:
    """One graded violation where ``need`` is above ``limit``, else nothing."""
    if need > limit:
        yield Violation(name, need / max(limit, 1) - 1, f"{name}: {need:g}{unit} needed, {limit:g}{unit} allowed")
