"""Again: one candidate of a journal compiled, checked and timed once more, to see for oneself how it failed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna

from ..errors import DsaError
from ..gpu import Gpu
from ..kernels.render import template_name, template_sha
from ..ops import all_ops
from ..problem.op import Case, Config, Op
from .evaluate import Evaluator
from .journal import read_study
from .on_gpu import GpuEvaluator
from .outcome import Kind, Outcome
from .pool import CompilePool
from .problem import Problem
from .space import Candidate, Space


class NoTrial(DsaError):
    """What is named is no candidate of a journal."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"--again {name}: {reason}; name a journal and a trial as `tune` prints them, .tune/…/x.journal:17.")


@dataclass(frozen=True)
class Again:
    """What became of a candidate, then and now."""

    problem: str
    config: Config
    before: Kind
    now: Outcome


@dataclass(frozen=True)
class Trial:
    """A candidate of a journal."""

    op: Op
    case: Case
    candidate: Candidate
    space: Space
    outcome: Outcome


def load(name: str, gpu: Gpu) -> Trial:
    """The candidate that ``<journal>:<trial>`` names, for ``gpu``.

    Raises:
        NoTrial: there is none, its template is another one today, or it is of another GPU.
    """
    path, _, number = name.rpartition(":")
    if not number.isdecimal() or not Path(path).is_file():
        raise NoTrial(name, "there is no such journal" if number.isdecimal() else "it ends in no number")
    try:
        study = read_study(Path(path))
        return _trial(name, study, int(number), gpu)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise NoTrial(name, f"it cannot be read ({type(error).__name__}: {error})") from error


def _trial(name: str, study: optuna.Study, number: int, gpu: Gpu) -> Trial:
    identity, stated = study.user_attrs["identity"], study.user_attrs["case"]
    op = all_ops()[identity["op"]]
    if identity["gpu"]["id"] != gpu.id:
        raise NoTrial(name, f"it is of {identity['gpu']['id']}, here is {gpu.id}")
    if identity["template"] != template_sha(template_name(op, identity["backend"])):
        raise NoTrial(name, "its template has changed since")
    trials = study.get_trials(deepcopy=False)
    if number >= len(trials) or "outcome" not in trials[number].user_attrs:
        raise NoTrial(name, "no candidate was tried there")
    case = Case(op.sizes_type.from_dict(stated["sizes"]), stated["distribution"])
    space = Space(op, op.spec_type.from_dict(identity["spec"]), identity["backend"], gpu, case.sizes.bucket())
    candidate = space.candidate(space.decode(trials[number].params))
    return Trial(op, case, candidate, space, Outcome.from_json(trials[number].user_attrs["outcome"]))


def again(name: str, gpu: Gpu) -> Again:
    """Compile, check and time the candidate that ``<journal>:<trial>`` names on the GPU at hand; nothing is recorded.

    Raises:
        NoTrial: there is none.
    """
    trial = load(name, gpu)
    problem = Problem(trial.op, trial.space.spec, trial.case, gpu)
    with _evaluator(gpu) as evaluator:
        now = _judged(evaluator, problem, trial.candidate)
    return Again(problem.id, trial.candidate.config, trial.outcome.kind, now)


@contextmanager
def _evaluator(gpu: Gpu) -> Iterator[GpuEvaluator]:
    with tempfile.TemporaryDirectory(prefix="dsa-again-") as builds, CompilePool(gpu, Path(builds), 1) as pool:
        evaluator = GpuEvaluator(pool)
        with evaluator:
            yield evaluator


def _judged(evaluator: GpuEvaluator, problem: Problem, candidate: Candidate) -> Outcome:
    _compile(evaluator, candidate)
    failure = evaluator.failure(candidate)
    if failure is not None:
        return failure
    trouble = evaluator.set_up(problem, candidate.config.backend)
    if trouble:
        return Outcome(Kind.LAUNCH_ERROR, detail=f"the problem cannot be set up: {trouble}", fatal=True)
    return evaluator.judge(problem, candidate)


def _compile(evaluator: Evaluator, candidate: Candidate) -> None:
    evaluator.pool.request(candidate.rendered)
    while not evaluator.compiled(candidate):
        evaluator.pool.poll()
        time.sleep(0.02)
