"""Proposals: which of the feasible configs to try next, by what is known of all that were tried.

Every feasible config is asked about, so that none is proposed twice, and none that cannot be built. What is under way counts
as if it were as fast as is expected of it: so the proposals that a machine with many compilers wants at once lie apart.
The last third of the trials go to neighbours of the fastest, the trades of sizes among them (``Space.neighbours``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from ..problem.op import Config, Parameter
from .space import Space, by_size
from .surrogate import Array, Surrogate

LIMIT = 4000
"""Configs that are asked about; of more feasible ones so many, drawn at random, with the neighbours of the best."""
_DRAWS = 40_000  # points of a space too large to list, from which feasible ones are taken
_FIRST = 6  # configs that lie apart, before what is known of them says where to look
_LAST = 1 / 3  # of the trials: a surrogate of some dozens of times passes over what is two steps away
_FASTEST = 2  # whose neighbours are tried last; of one alone eight at once lost more
_NEAR = 0.05  # what is expected to be within so much of the best is worth a trial, though it may not be faster
_DOUBT = 0.05  # of the variance: what a ranking says is off by a fifth of the spread of times
_SLOWEST = 4.0  # times the best: what is slower, or fails, tells no more than that


class Proposals:
    """The configs of a space that were not tried yet, and which of them is the most promising."""

    def __init__(self, space: Space, seed: int, trials: int) -> None:
        self._space, self._order, self._trials = space, random.Random(seed), trials
        self._scales = [_scale(parameter) for parameter in space.table]
        self._configs: list[Config] = []
        self._points: list[list[float]] = []
        self._number: dict[Config, int] = {}
        self._values: dict[int, float | None] = {}
        self._under_way: set[int] = set()
        self._dropped: set[int] = set()
        self._expected: dict[int, float] = {}
        self._around: dict[int, list[int]] = {}
        self._surrogate = Surrogate(len(space.table))
        self.add(self._some(space.feasible()))

    def add(self, configs: Iterable[Config]) -> None:
        """Further feasible configs."""
        for config in configs:
            if config not in self._number:
                self._number[config] = len(self._configs)
                self._configs.append(config)
                self._points.append([scale[config[p.name]] for p, scale in zip(self._space.table, self._scales, strict=True)])

    def begin(self, config: Config) -> None:
        """A config is under way."""
        self.add([config])
        self._under_way.add(self._number[config])

    def learn(self, config: Config, time_us: float | None) -> None:
        """What became of a config: its time, or None where it failed."""
        self.add([config])
        number = self._number[config]
        self._under_way.discard(number)
        self._values[number] = time_us

    def expect(self, times_us: Mapping[Config, float]) -> None:
        """What a ranking says of configs, one that has been timed among them; their times are right relative to each other."""
        self.add(times_us)
        self._expected = {self._number[config]: math.log(time_us) for config, time_us in times_us.items()}

    def forget(self, config: Config) -> None:
        """A config is not under way any more, and nothing was learned."""
        self._under_way.discard(self._number[config])

    def drop(self, config: Config) -> None:
        """Never propose a config: it is the same code as one that is under way."""
        self.add([config])
        self._dropped.add(self._number[config])

    def spread(self, count: int) -> list[Config]:
        """So many configs that lie apart, from those that were begun too; they are not begun by that."""
        found: list[int] = []
        points = np.array(self._points)
        for _ in range(count):
            open_numbers = [
                n for n in range(len(points)) if n not in self._values and n not in self._under_way and n not in found
            ]
            if not open_numbers:
                break
            found.append(open_numbers[int(np.argmax(self._distances(points, open_numbers, found)))])
        return [self._configs[number] for number in found]

    def next(self) -> Config | None:
        """The most promising config that is neither known nor under way; None where there is none."""
        closed = self._under_way | self._dropped | self._values.keys()
        open_numbers = [number for number in range(len(self._configs)) if number not in closed]
        if not open_numbers:
            return None
        points = np.array(self._points)
        known = [time_us for time_us in self._values.values() if time_us is not None]
        begun = len(self._values) + len(self._under_way)
        few = begun < _FIRST or not known
        if not few and self._trials - begun <= _LAST * self._trials:
            open_numbers = self._near_the_fastest(closed) or open_numbers
            points = np.array(self._points)
        merits = self._distances(points, open_numbers) if few else self._merits(points, open_numbers, min(known))
        return self._configs[open_numbers[int(np.argmax(merits))]]

    def _near_the_fastest(self, closed: AbstractSet[int]) -> list[int]:
        """The neighbours of the fastest that are not closed; those that a sample of a large space has left out come in."""
        timed = sorted((time_us, number) for number, time_us in self._values.items() if time_us is not None)
        near: set[int] = set()
        for _, number in timed[:_FASTEST]:
            if number not in self._around:
                found = self._space.neighbours(self._configs[number])
                self.add(found)
                self._around[number] = [self._number[config] for config in found]
            near.update(self._around[number])
        return sorted(near - closed)

    def _merits(self, points: Array, open_numbers: Sequence[int], best_us: float) -> Array:
        """The improvement that is expected of each, in shares of the best."""
        floor = math.log(best_us)
        values = [min(math.log(us / best_us), math.log(_SLOWEST)) if us else math.log(_SLOWEST) for us in self._values.values()]
        numbers, doubts = list(self._values), [0.0] * len(values)
        measured = {n: value for n, value in zip(numbers, values, strict=True) if n in self._expected}
        if measured:  # the ranking knows no absolute times
            shift = float(np.median([value - self._expected[number] for number, value in measured.items()]))
            others = [number for number in self._expected if number not in self._values]
            numbers += others
            values += [max(0.0, min(self._expected[number] + shift, math.log(_SLOWEST))) for number in others]
            doubts += [_DOUBT] * len(others)
        self._surrogate.fit(points[numbers], np.array(values) + floor, np.array(doubts))
        if self._under_way:
            self._surrogate.imagine(points[sorted(self._under_way)])
        return self._surrogate.predict(points[open_numbers]).improvement(floor + _NEAR)

    def _distances(self, points: Array, open_numbers: Sequence[int], others: Sequence[int] = ()) -> Array:
        """Little is known yet: how far each is from all that were begun, by chance where that is alike."""
        chance = np.array([self._order.random() for _ in open_numbers])
        taken = sorted({*self._under_way, *self._values, *others})
        if not taken:
            return chance
        apart: Array = np.abs(points[open_numbers][:, None, :] - points[taken][None, :, :]).sum(axis=2).min(axis=1)
        return apart + 0.5 * chance

    def _some(self, feasible: Sequence[Config] | None) -> Sequence[Config]:
        if feasible is None:
            feasible = self._space.drawn(_DRAWS)
        return self._order.sample(feasible, LIMIT) if len(feasible) > LIMIT else feasible


def _scale(parameter: Parameter) -> Mapping[Any, float]:
    """A parameter's values on [0, 1], by size and not in the order of its choices, which begin with the default."""
    ordered = by_size(parameter)
    return {choice: number / max(len(ordered) - 1, 1) for number, choice in enumerate(ordered)}
