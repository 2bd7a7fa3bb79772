"""Fitting: the configs of a backend that break no constraint, without asking about each of a hundred thousand.

What a constraint had looked at when it refused a config tells which others it refuses: all that agree in those values. So
constraints must follow from nothing but a config's values, the spec, the GPU and the sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .config import Config, Parameter, Violation
from .values import Scalar

Point = tuple[Scalar, ...]
"""Values of the first parameters of a table, in its order."""
_DRAWN = 500  # points whose reasons are looked at, beside those that the search asked about
_MOST_REASONS = 5


class Fitting:
    """The configs that break no constraint, in the order of their choices.

    Args:
        table: the backend's parameters.
        broken: the constraints that a config breaks, which asks for the config's values as it needs them.
    """

    def __init__(self, backend: str, table: Sequence[Parameter], broken: Callable[[Config], Iterable[Violation]]) -> None:
        self._backend, self._table, self._broken = backend, table, broken
        self._names = [parameter.name for parameter in table]
        self._refused: dict[tuple[int, ...], dict[Point, Config]] = {}
        """By places in the table, the values there that no config may have, and the first that was refused for them."""

    def __iter__(self) -> Iterator[Config]:
        return self._from(())

    def reasons(self) -> list[str]:
        """Why no config fits, where none does: what all of them break, or else what those break that break least, a few.

        Those that the iteration asked about stand for all, and some that are drawn, the same every time.
        """
        order = random.Random(0)
        drawn = [tuple(order.choice(parameter.choices) for parameter in self._table) for _ in range(_DRAWN)]
        asked = [config for known in self._refused.values() for config in known.values()]
        asked += [self._config(point) for point in dict.fromkeys(drawn)]
        told = [dict.fromkeys(violation.reason for violation in self._broken(config)) for config in asked]
        always = [reason for reason in told[0] if all(reason in each for each in told)]
        least = min(len(each) for each in told)
        nearest = dict.fromkeys(reason for each in told if len(each) == least for reason in each)
        return always or list(nearest)[:_MOST_REASONS]

    def _from(self, point: Point) -> Iterator[Config]:
        """Those that begin with these values."""
        if len(point) < len(self._table):
            for choice in self._table[len(point)].choices:
                if self._is_refused(point):  # which may be known since the last choice
                    return
                yield from self._from((*point, choice))
        elif not self._is_refused(point):
            config = self._config(point)
            if self._fits(config, point):
                yield config

    def _is_refused(self, point: Point) -> bool:
        """Whether it is known that no config fits that begins so."""
        return any(
            (not places or places[-1] < len(point)) and tuple(point[place] for place in places) in known
            for places, known in self._refused.items()
        )

    def _fits(self, config: Config, point: Point) -> bool:
        """Whether a config breaks nothing; what its first violation says of others is kept."""
        watched = _Watched(config)
        if not any(True for _ in self._broken(watched)):
            return True
        places = tuple(place for place, name in enumerate(self._names) if name in watched.looked_at)
        self._refused.setdefault(places, {})[tuple(point[place] for place in places)] = config
        return False

    def _config(self, point: Point) -> Config:
        return Config.of(self._backend, **dict(zip(self._names, point, strict=True)))


class _Watched(Config):
    """A config that notes which of its values somebody looks at: all, where it is hashed, compared or listed."""

    def __init__(self, config: Config) -> None:
        object.__setattr__(self, "backend", config.backend)
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "looked_at", set())

    looked_at: set[str]
    _config: Config

    def __getitem__(self, name: str) -> Any:
        self.looked_at.add(name)
        return self._config[name]

    @property
    def values(self) -> tuple[tuple[str, Scalar], ...]:
        """All of them."""
        self.looked_at.update(self._config.to_dict())
        return self._config.values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and (self.backend, self.values) == (other.backend, other.values)

    def __hash__(self) -> int:
        return hash(Config(self.backend, self.values))
