"""Isolation: a candidate that raises, hangs or kills its process is an outcome; the run goes on with a new process."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import pytest

from dsa_codegen.kernels.build import Built
from dsa_codegen.kernels.render import render
from dsa_codegen.ops import quantize
from dsa_codegen.problem.op import Config
from dsa_codegen.tune import lane
from dsa_codegen.tune.evaluate import Task
from dsa_codegen.tune.on_gpu import GpuEvaluator
from dsa_codegen.tune.outcome import Kind
from dsa_codegen.tune.pool import CompilePool

import tune_jobs as fake
from support import H200
from tune_jobs import landscape
from tune_support import FAKE, SPACE, config, open_study

ANY = SimpleNamespace(id="any")  # the jobs here do not look at the problem


def collect(evaluator, study, configs, seconds=60.0):
    """Outcomes by config."""
    study.suggest(configs)
    waiting = set()
    for _ in configs:
        candidate = study.ask()
        evaluator.submit(study, ANY, candidate)
        waiting.add(candidate.config)
    found = {}
    end = time.monotonic() + seconds
    while len(found) < len(waiting) and time.monotonic() < end:
        for done in evaluator.poll():
            study.tell(done.task.candidate, done.outcome)
            found[done.task.candidate.config] = done.outcome
        time.sleep(0.01)
    assert not evaluator.backlog
    return [found[each] for each in configs]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with CompilePool(H200, tmp_path_factory.mktemp("builds"), 2, compile=fake.compile_quickly, deadline_s=2.0) as made:
        yield made


@pytest.fixture(scope="module")
def shared(pool):
    """One process for all tests: starting one takes seconds."""
    with GpuEvaluator(pool, FAKE) as evaluator:
        yield evaluator


def test_what_befalls_the_compiler(tmp_path, shared):
    study = open_study(tmp_path, seeds=[])
    unruly = [config(block_n=256, block_q=1, num_warps=8, num_stages=stages) for stages in (2, 3, 4)]
    outcomes = collect(shared, study, [*unruly, config()])
    assert [outcome.kind for outcome in outcomes] == [Kind.COMPILE_ERROR, Kind.COMPILE_TIMEOUT, Kind.WORKER_DIED, Kind.OK]
    assert "shared memory" in outcomes[0].detail
    assert "exit code 11" in outcomes[2].detail


def test_what_befalls_the_gpu(tmp_path, shared, monkeypatch):
    monkeypatch.setattr(lane, "RUN_SECONDS", 2.0)
    study = open_study(tmp_path, seeds=[])
    unruly = [config(block_q=1, block_n=128, splits=splits) for splits in (1, 2, 4, 8)]
    outcomes = collect(shared, study, [*unruly, config()])
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == [Kind.LAUNCH_ERROR, Kind.RUN_TIMEOUT, Kind.WORKER_DIED, Kind.CONTEXT_LOST, Kind.OK]
    assert "illegal memory access" in outcomes[3].detail
    assert outcomes[-1].time_us == landscape(config())
    assert study.counts[Kind.LAUNCH_ERROR] == study.counts[Kind.CONTEXT_LOST] == 1


def test_only_an_error_that_poisons_costs_a_new_process(tmp_path, shared):
    study = open_study(tmp_path, seeds=[])
    collect(shared, study, [config()])
    process = shared.lanes[0].worker._process
    collect(shared, study, [config(block_q=1, block_n=128, splits=1)])
    assert shared.lanes[0].worker._process is process, "out of resources leaves the context whole"
    collect(shared, study, [config(block_q=1, block_n=128, splits=8)])
    assert shared.lanes[0].worker._process is not process


def test_a_problem_that_cannot_be_set_up_ends_its_study_alone(tmp_path, pool):
    study = open_study(tmp_path, seeds=[])
    jobs = dataclasses.replace(FAKE, prepare=fake.prepare_badly)
    with GpuEvaluator(pool, jobs) as evaluator:
        (outcome,) = collect(evaluator, study, [config()])
    assert outcome.fatal
    assert "no room for the inputs" in study.failure
    assert study.exhausted


def test_compilers_run_beside_each_other(tmp_path):
    """Each waits for the other, ahead of whatever uses them; a source that is asked for twice is compiled once."""
    first, second = (SPACE.candidate(config(num_stages=stages)).rendered for stages in (2, 3))
    with CompilePool(H200, tmp_path, 2, compile=fake.compile_together, deadline_s=60.0) as pool:
        assert [pool.request(each) for each in (first, second, first)] == [True, True, False]
        while pool.backlog:
            pool.poll()
            time.sleep(0.01)
    assert all(isinstance(result, Built) for result in pool.results.values()) and len(pool.results) == 2


@pytest.mark.slow
def test_the_second_run_compiles_nothing_again(tmp_path):
    """The compilers' own cache is that of all runs: what is there is taken, within a moment of their start."""
    rendered = render(quantize.OP, quantize.QuantizeSpec(32), Config.of("triton", block_t=1, num_warps=1))
    found = []
    for _ in range(2):
        with CompilePool(H200, tmp_path / "builds", 1) as pool:
            pool.request(rendered)
            while pool.backlog:
                pool.poll()
                time.sleep(0.01)
            found.append(pool.results[rendered.sha])
    assert [each.folder for each in found] == [tmp_path / "builds" / found[0].folder.name] * 2
    (file,) = found[0].folder.glob("*.cubin")
    assert file.stat().st_mtime_ns < found[1].folder.stat().st_mtime_ns, "found, not made anew"
    assert len(list((tmp_path / "builds").iterdir())) == 1


def test_candidates_are_dealt_out_to_the_gpus_and_finals_are_held_on_one(tmp_path, pool, monkeypatch):
    """Two devices that are not there: each waits for the other's candidate, so that neither can do all the work."""
    monkeypatch.setenv("TUNE_TEST_FOLDER", str(tmp_path))
    study = open_study(tmp_path, seeds=[])
    jobs = dataclasses.replace(FAKE, evaluate=fake.evaluate_together, final=fake.final_somewhere)
    with GpuEvaluator(pool, jobs, devices=("0", "1")) as evaluator:
        outcomes = collect(evaluator, study, [config(num_stages=stages) for stages in (4, 5)])
        candidates = [SPACE.candidate(config(num_stages=stages)) for stages in (4, 5)]
        assert len(evaluator.final(ANY, candidates, 1.0)) == 2
    assert all(outcome.ok for outcome in outcomes)
    assert sorted(path.name for path in tmp_path.glob("device-*")) == ["device-0", "device-1"]
    assert [path.name for path in tmp_path.glob("final-*")] == ["final-0"]


def test_one_compilation_serves_every_launch(tmp_path, shared):
    study = open_study(tmp_path, seeds=[])
    before = len(shared.pool.results)
    outcomes = collect(shared, study, [config(num_stages=2, splits=splits) for splits in (1, 2, 4)])
    assert all(outcome.ok for outcome in outcomes)
    assert len(shared.pool.results) == before + 1


def test_what_a_study_tries_first_is_compiled_first(tmp_path):
    """Its default stands before what is compiled to be ranked; a GPU has nothing to judge until then."""
    sources = [SPACE.candidate(config(num_stages=stages)).rendered for stages in (2, 3, 4)]
    pool = CompilePool(H200, tmp_path, 0, compile=fake.compile_well)
    for rendered, first in zip(sources, (False, False, True), strict=True):
        pool.request(rendered, first)
    assert list(pool._queue) == [sources[2], *sources[:2]]


def test_compilers_give_up_what_no_final_needs(tmp_path):
    """The final waits for its own candidates alone, on a host that compiles nothing else."""
    needed = [SPACE.candidate(config(num_stages=stages)) for stages in (2, 3, 4)]
    hanging = SPACE.candidate(config(block_n=256, num_stages=3))
    with CompilePool(H200, tmp_path, 2, compile=fake.compile_quickly) as pool, GpuEvaluator(pool, FAKE) as evaluator:
        for each in (hanging, *needed):
            pool.request(each.rendered)
        begun = time.monotonic()
        evaluator.finish_builds(needed[:1])
        assert evaluator.is_built(needed[0]) and time.monotonic() - begun < 20, "a compiler that hangs for a minute"
        assert not pool.backlog and not evaluator.compiled(hanging)
        evaluator.finish_builds(needed[1:])
        assert all(map(evaluator.is_built, needed)), "what was given up can be asked for again"


def test_every_study_gets_its_turn_on_a_gpu(tmp_path):
    """Defaults first; then the problem at hand until another has had much less; not what another GPU has at hand."""
    evaluator = GpuEvaluator(SimpleNamespace(), FAKE, devices=("0", "1"))
    one, other = evaluator.lanes
    problems = [SimpleNamespace(id=name) for name in "xyz"]
    studies = [open_study(tmp_path / name, seeds=[]) for name in ("a", "b", "c")]
    evaluator._ready = [Task(*each, SPACE.candidate(config()), True) for each in zip(studies, problems, strict=True)]
    one.at_hand, other.at_hand = problems[0].id, problems[2].id

    def picked() -> int:
        return evaluator._ready.index(evaluator._pick(one))

    studies[0].seen = studies[2].seen = {"something": None}
    assert picked() == 1, "its default was not judged yet"
    studies[1].seen = {"something": None}
    studies[0].spent_s = 3.0
    assert picked() == 0
    studies[0].spent_s = 30.0
    assert picked() == 1, "not the third, which the other GPU has at hand"
    one._drawings = [20.0]
    assert picked() == 0, "drawing takes long here"
