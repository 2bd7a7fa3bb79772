"""Regret: how much slower than the best of a sweep the configs are that the search ends with, over many seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..problem.op import Config
from ..proof.timing import TIE
from .field import timed_in_turns, winner_of
from .plan import ON_GPU
from .problem import Problem
from .replay import METHOD, Clock, ReplayEvaluator, SweptSpace
from .results import contenders
from .search import Search
from .shelf import Memory
from .study import Study
from .sweep import Sweep

FINAL_S = 2.0


@dataclass(frozen=True)
class Run:
    """What one search ended with."""

    config: Config
    time_us: float
    """Its median over all visits of the sweep."""
    trials: int
    seconds: float
    """That the search and its final would have taken."""
    flipped: bool
    """Whether the final chose another than the fastest of the search."""


@dataclass(frozen=True)
class Regret:
    """The searches of one case, beside what trying everything finds."""

    sweep: Sweep
    case: int
    runs: tuple[Run, ...]
    best: Config
    best_us: float
    band_us: float
    """What is no slower is as good as the best, by the rule of finals: within 1 %, or two median absolute deviations."""
    default_us: float

    @property
    def label(self) -> str:
        """``select.cuda, rows64-columns32768-normal``."""
        return f"{self.sweep.op.name}.{self.sweep.backend}, {self.sweep.cases[self.case].case.id}"

    @property
    def configs(self) -> int:
        """Configs that were swept."""
        return sum(result is not None for result in self.sweep.cases[self.case].results)

    def of(self, time_us: float) -> float:
        """How much slower than the best, as a share of it."""
        return time_us / self.best_us - 1

    @property
    def losses(self) -> list[float]:
        """Of the runs, ascending."""
        return sorted(self.of(run.time_us) for run in self.runs)

    @property
    def mean(self) -> float:
        """Over the runs."""
        return statistics.fmean(self.losses)

    @property
    def p90(self) -> float:
        """Nine of ten runs lose no more."""
        return self.losses[max(0, -(-9 * len(self.losses) // 10) - 1)]

    @property
    def seconds(self) -> float:
        """That a search and its final would have taken, on average."""
        return statistics.fmean(run.seconds for run in self.runs)

    @property
    def same(self) -> float:
        """Share of the runs that ended with the best, or with what noise cannot tell from it."""
        return sum(run.config == self.best or run.time_us <= self.band_us for run in self.runs) / len(self.runs)

    @property
    def top1(self) -> float:
        """Share of the runs that ended with the very best config."""
        return sum(run.config == self.best for run in self.runs) / len(self.runs)

    @property
    def flips(self) -> float:
        """Share of the runs whose final overruled the search."""
        return sum(run.flipped for run in self.runs) / len(self.runs)


def regret(sweep: Sweep, case: int, runs: Sequence[Run]) -> Regret:
    """What searches of a sweep's case ended with, beside its best."""
    swept = sweep.cases[case]
    times = {e.config: us for n, e in enumerate(sweep.entries) if (us := swept.time_us(n)) is not None}
    best = min(times, key=lambda config: times[config])
    visits = swept.results[sweep.number[best]]
    assert isinstance(visits, tuple)
    mad = statistics.median(abs(each - times[best]) for each in visits)
    band_us = times[best] + max(TIE * times[best], 2 * mad)
    return Regret(sweep, case, tuple(runs), best, times[best], band_us, times[swept.default])


def search(sweep: Sweep, case: int, seed: int, *, trials: int = ON_GPU.trials, gpus: int = 1) -> Run:
    """One search of a sweep's case, as a run of that budget on so many GPUs does it, and its final."""
    study, problem = _study(sweep, case, seed, trials)
    swept, clock = sweep.cases[case], Clock()
    evaluator = ReplayEvaluator(sweep, seed, clock, gpus)
    Search({study: problem}, evaluator, lambda: None, clock).run(float("inf"))
    field, _ = timed_in_turns(problem, contenders([study], swept.default), evaluator, FINAL_S)
    winner = winner_of(problem, field, evaluator, lambda found, outcome: None)
    ((fastest, _),) = study.fastest(1)
    assert winner is not None, "the default is right"
    config = winner.candidate.config
    time_us = swept.time_us(sweep.number[config])
    assert time_us is not None
    return Run(config, time_us, len(study.seen), clock.now, fastest.key != winner.candidate.key)


def pace(sweep: Sweep, seconds: float, *, gpus: int, cores: int, trials: int = ON_GPU.trials, seed: int = 0) -> int:
    """How many candidates a search of all cases of a sweep judges in so many seconds on so many GPUs and cores."""
    clock = Clock()
    evaluator = ReplayEvaluator(sweep, seed, clock, gpus, cores)
    studies = dict(_study(sweep, case, seed, trials) for case in range(len(sweep.cases)))
    Search(studies, evaluator, lambda: None, clock).run(seconds)
    return evaluator.judged


def _study(sweep: Sweep, case: int, seed: int, trials: int) -> tuple[Study, Problem]:
    space, swept = SweptSpace.of(sweep, case), sweep.cases[case]
    seeds = [swept.default]
    study = Study(space, swept.case, Path(), method=METHOD, trials=trials, seeds=seeds, seed=seed, shelf=Memory())
    return study, Problem(sweep.op, sweep.spec, swept.case, space.gpu)
