"""Ranking: how long a compiled candidate takes on a GPU that is not here, judged by its machine code and calibrated on sweeps.

What a template's times depend on can be read off its binaries: registers, spills and shared memory, and by these how many
blocks share an SM and how many waves a grid makes; and how many instructions of which kind stand inside and outside of loops.
How much each counts is another matter for each template: it is fitted to a sweep of it (``scripts/calibrate.py``), and what was
learned from one says nothing about another. Templates that no sweep has measured are judged by ``model``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..gpu import Gpu
from ..kernels.anatomy import Dissected, dissected
from ..kernels.backends import Resources
from ..kernels.build import Built, build
from ..kernels.render import Rendered
from ..problem.op import Case, Config, Launch, Op
from ..problem.values import Spec
from . import model
from .sweep import Sweep, gpu_of

VERSION = f"{model.VERSION}.1"
"""Part of a modelled study's identity."""
FEATURES = (
    *("waves", "resident", "warps", "blocks", "registers", "smem", "threads", "spills"),
    *("all", "loops", "nested", "mma", "float", "load", "shared", "shared_atomic", "exchange", "barrier", "branch"),
)
"""Logarithms of waves of blocks, blocks and warps that an SM holds at once, resources, instructions by place and kind."""
TOP = 10
"""Configs that a ranking proposes, one of which should be as fast as the best."""
_FILE = Path(__file__).with_name("ranking.json")
_RIDGE = 1.0
_Row = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """How much each feature counts for one template, and how well that ranks the sweep which it was fitted to."""

    weights: tuple[float, ...]
    level: float
    """Of the logarithm of the time in µs."""
    gpu: str
    correlation: Mapping[str, float]
    """By case: Spearman's rank correlation with the measured times, of configs that were left out of the fit."""
    top: Mapping[str, float]
    """By case: the measured time of the fastest of the ten best, among those left out, in multiples of the fastest there."""

    def time_us(self, features: Sequence[float]) -> float:
        """Microseconds that a candidate would take; good for ranking."""
        return math.exp(self.level + sum(w * f for w, f in zip(self.weights, features, strict=True)))


def is_calibrated(op: str, backend: str) -> bool:
    """Whether a sweep has shown how much the features of a template count."""
    return f"{op}.{backend}" in calibrations()


def trust(names: Iterable[str]) -> Iterator[str]:
    """For people: how well the rankings of these templates ("select.cuda") agree with what GPUs have measured."""
    unknown = []
    for name in dict.fromkeys(names):
        found = calibrations().get(name)
        if found is None:
            unknown.append(name)
            continue
        low, high = min(found.correlation.values()), max(found.correlation.values())
        yield f"{name} is ranked by its machine code; rank correlation with a sweep on {found.gpu}: {low:.2f} to {high:.2f}"
    if unknown:
        yield f"ranked by a plain model that no sweep has judged: {', '.join(unknown)}"


def compile(rendered: Rendered, gpu: Gpu) -> Built:
    """The job of a pool whose builds are ranked: what a calibration looks at is read where there is one."""
    return dissected(rendered, gpu) if is_calibrated(rendered.op, rendered.backend) else build(rendered, gpu)


def estimate_us(op: Op, spec: Spec, config: Config, case: Case, gpu: Gpu, built: Built) -> float:
    """Microseconds of one call, by the template's calibration where there is one; infinite where a kernel does not fit."""
    modelled = model.modelled_us(op, spec, config, case, gpu, built.resources)
    found = calibrations().get(f"{op.name}.{config.backend}")
    if found is None or not isinstance(built, Dissected) or not built.anatomies or not 0 < modelled < math.inf:
        return modelled
    mixes = {name: each.mix for name, each in built.anatomies.items()}
    return found.time_us(features(model.plan(op, spec, config, case, gpu), built.resources, mixes, gpu))


def features(
    launches: Sequence[Launch], resources: Mapping[str, Resources], mixes: Mapping[str, Mapping[str, int]], gpu: Gpu
) -> list[float]:
    """What a ranking looks at, in the order of ``FEATURES``, of the launch that has the most threads."""
    largest = max(launches, key=lambda launch: math.prod(launch.grid) * resources[launch.kernel].threads)
    usage, mix, blocks = resources[largest.kernel], mixes[largest.kernel], math.prod(largest.grid)
    resident = max(1, model.blocks_per_sm(usage, gpu))
    at_once = min(resident, -(-blocks // gpu.sms))
    values = {
        "waves": -(-blocks // (resident * gpu.sms)),
        "resident": at_once,
        "warps": at_once * usage.threads / 32,
        "blocks": blocks,
        "registers": usage.registers,
        "smem": usage.smem + 1024,
        "threads": usage.threads,
        "spills": 1 + usage.spills,
        **{name: 1 + count for name, count in mix.items()},
    }
    return [math.log(values[name]) for name in FEATURES]


@functools.cache
def calibrations() -> Mapping[str, Calibration]:
    """By template ("select.cuda"), what ``scripts/calibrate.py`` has written."""
    values = json.loads(_FILE.read_text())
    return {name: Calibration(**{**each, "weights": tuple(each["weights"])}) for name, each in values.items()}


def write(found: Mapping[str, Calibration], path: Path = _FILE) -> None:
    """The file that ``calibrations`` reads."""
    rounded = {name: {**asdict(each), "weights": [round(w, 5) for w in each.weights]} for name, each in sorted(found.items())}
    path.write_text(json.dumps(rounded, indent=1) + "\n")


def calibrate(sweep: Sweep) -> Calibration:
    """Fit to a sweep, all its cases together: fast configs count more, and only differences within a case count."""
    tables = [_table(sweep, number) for number in range(len(sweep.cases))]
    weights, level = _fit(tables, [np.ones(len(times), dtype=bool) for _, times in tables])
    halves = [np.arange(len(times)) % 2 == 0 for _, times in tables]
    held_out, _ = _fit(tables, halves)
    correlation, top = {}, {}
    for swept, (rows, times), half in zip(sweep.cases, tables, halves, strict=True):
        score, took = (rows @ held_out)[~half], times[~half]
        correlation[swept.case.id] = round(spearman(score, took), 3)
        top[swept.case.id] = round(float(np.exp(took[np.argsort(score)[:TOP]].min() - took.min())), 3)
    return Calibration(tuple(map(float, weights)), round(level, 5), sweep.gpu.id, correlation, top)


def spearman(one: _Row, other: _Row) -> float:
    """Rank correlation; ties have their order by chance."""
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])


def _table(sweep: Sweep, number: int) -> tuple[_Row, _Row]:
    """Features of every candidate that was timed, in no order, and the logarithms of their times."""
    swept, gpu = sweep.cases[number], gpu_of(sweep)
    rows, times = [], []
    seen = set()
    for entry_number, entry in enumerate(sweep.entries):
        time_us, source = swept.time_us(entry_number), sweep.sources[entry.source]
        launch_only = tuple(entry.config[p.name] for p in sweep.table if p.launch_only)
        if time_us is None or (entry.source, launch_only) in seen:
            continue
        seen.add((entry.source, launch_only))  # configs of one text were timed once
        launches = model.plan(sweep.op, sweep.spec, sweep.today(entry.config), swept.case, gpu)
        rows.append(features(launches, source.resources, source.mix, gpu))
        times.append(math.log(time_us))
    order = np.random.default_rng(0).permutation(len(rows))
    return np.array(rows)[order], np.array(times)[order]


def _fit(tables: Sequence[tuple[_Row, _Row]], parts: Sequence[NDArray[np.bool_]]) -> tuple[_Row, float]:
    """Ridge regression within cases; how fast a config is says how much it counts."""
    rows = np.vstack([(rows - rows[part].mean(axis=0))[part] for (rows, _), part in zip(tables, parts, strict=True)])
    times = np.concatenate([(times - times[part].mean())[part] for (_, times), part in zip(tables, parts, strict=True)])
    counts = np.concatenate([np.exp(times[part].min() - times)[part] for (_, times), part in zip(tables, parts, strict=True)])
    spread = rows.std(axis=0) + 1e-9
    scaled = rows / spread
    normal = (scaled * counts[:, None]).T @ scaled + _RIDGE * np.eye(scaled.shape[1])
    weights = np.linalg.solve(normal, (scaled * counts[:, None]).T @ times) / spread
    levels = [
        times[part].mean() - float(rows[part].mean(axis=0) @ weights) for (rows, times), part in zip(tables, parts, strict=True)
    ]
    return weights, float(np.mean(levels))
