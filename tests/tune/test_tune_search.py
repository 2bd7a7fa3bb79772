"""The search over many studies: it ends, shares time fairly, shares what is found, and stops when the time is over."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

from dsa_codegen.ops.indexer import IndexerSizes
from dsa_codegen.problem.op import Case
from dsa_codegen.tune import ranking
from dsa_codegen.tune.outcome import Kind, Outcome
from dsa_codegen.tune.progress import Progress, StudyStatus
from dsa_codegen.tune.search import Search
from dsa_codegen.tune.space import Space

from tune_jobs import landscape, timed
from tune_support import CASE, DEFAULT, PROBLEM, SPACE, InstantEvaluator, InstantGpu, config, open_study

OTHER = Case(IndexerSizes(512, 8192), "causal")


def search(studies, evaluator, seconds=60.0):
    told = []
    Search(dict.fromkeys(studies, PROBLEM), evaluator, lambda: told.append(1)).run(time.monotonic() + seconds)
    return told


def test_ends_when_every_study_is_exhausted(tmp_path):
    studies = [open_study(tmp_path, trials=12), open_study(tmp_path, trials=12, case=OTHER)]
    told = search(studies, InstantEvaluator())
    assert [len(study.seen) for study in studies] == [12, 12]
    assert told, "progress was told"


def test_ends_when_the_time_is_over(tmp_path):
    def slowly(task):
        time.sleep(0.05)
        return timed(1.0)

    study = open_study(tmp_path, trials=10**6)
    begun = time.monotonic()
    search([study], InstantEvaluator(slowly), seconds=0.5)
    assert time.monotonic() - begun < 3
    assert 0 < len(study.seen) < 60
    assert study.in_flight == 0 or not study.close()


def test_finds_what_is_near_the_optimum(tmp_path):
    study = open_study(tmp_path, trials=40)
    search([study], InstantEvaluator())
    assert study.best.time_us <= 1.05 * min(map(landscape, SPACE.feasible()))


def test_slow_candidates_do_not_take_the_time_of_fast_ones(tmp_path):
    slow, fast = open_study(tmp_path, trials=10**6), open_study(tmp_path, trials=30, case=OTHER)

    class Evaluator(InstantEvaluator):
        def _advance(self):
            done = super()._advance()
            return [type(each)(each.task, each.outcome, 4.0 if each.task.study is slow else 0.1) for each in done]

    class Stop(Exception):
        pass

    def stop_when_the_fast_one_is_done():
        if fast.exhausted:
            raise Stop

    studies = dict.fromkeys((slow, fast), PROBLEM)
    with pytest.raises(Stop):
        Search(studies, Evaluator(), stop_when_the_fast_one_is_done).run(time.monotonic() + 60)
    assert len(slow.seen) < len(fast.seen) / 2


def test_a_find_is_tried_by_the_studies_of_the_same_code(tmp_path):
    optimum = config(block_q=2, block_n=128, num_stages=4, splits=2)
    assert landscape(optimum) == 100
    one = open_study(tmp_path, trials=4, seeds=[optimum])
    two = open_study(tmp_path, trials=4, case=OTHER, seeds=[config(block_q=1)])
    search([one, two], InstantEvaluator())
    assert SPACE.candidate(optimum).key in two.seen


def test_where_judging_is_free_every_study_sees_every_build(tmp_path):
    evaluator = InstantEvaluator()
    evaluator.free = True
    one, two = open_study(tmp_path, trials=16), open_study(tmp_path, trials=16, case=OTHER)
    search([one, two], evaluator)
    shared = one.seen.keys() & two.seen.keys()
    assert len(shared) >= 12


def test_every_default_is_tried_before_anything_else(tmp_path):
    evaluator = InstantEvaluator()
    cases = [CASE, OTHER, Case(IndexerSizes(512, 32768), "causal"), Case(IndexerSizes(4096, 8192), "causal")]
    studies = [open_study(tmp_path, case=case, trials=6) for case in cases]
    search(studies, evaluator)
    assert [task.study for task in evaluator.judged[:4]] == studies
    assert {task.candidate.config for task in evaluator.judged[:4]} == {DEFAULT}


def test_gpus_are_looked_at_after_every_question(tmp_path):
    """What is built does not wait until all are asked that there is room for."""
    at_once: list[int] = []

    class Evaluator(InstantEvaluator):
        def _advance(self):
            at_once.append(len(self._ready))
            return super()._advance()

    evaluator = Evaluator()
    evaluator.pool.size = 40
    search([open_study(tmp_path, trials=12), open_study(tmp_path, trials=12, case=OTHER)], evaluator)
    assert max(at_once) == 1


def test_compiled_candidates_are_ranked_for_the_sizes_that_they_serve(tmp_path, monkeypatch):
    """Studies of one code share what is compiled to be ranked; a config of one may not even be planned for another's sizes."""
    few, ranked = replace(SPACE, bucket=OTHER.sizes.bucket()), []
    fits = Space.fits
    monkeypatch.setattr(Space, "fits", lambda space, config: fits(space, config) and (space != few or config["block_q"] < 4))
    monkeypatch.setattr(ranking, "is_calibrated", lambda op, backend: True)

    class Evaluator(InstantGpu):
        def estimate_us(self, problem, candidate):
            ranked.append((problem, candidate.config))
            return 1.0

    first = open_study(tmp_path, trials=30)
    second = open_study(tmp_path, trials=30, space=few, case=OTHER, seeds=[config(block_q=2)])
    studies = {first: PROBLEM, second: replace(PROBLEM, case=OTHER)}
    Search(studies, Evaluator(), lambda: None, itertools.count().__next__).run(8)
    sizes = [sum(problem is of for of, _ in ranked) for problem in studies.values()]
    assert sizes[0] >= 24 > sizes[1] > 1
    assert all(second.space.fits(each) for problem, each in ranked if problem is studies[second])


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_gpu_has_four_candidates_of_a_study_under_way(tmp_path, gpus):
    """Compilers take longer than a GPU does: fewer would leave it waiting, many more are asked for before much is known."""
    study, most = open_study(tmp_path, trials=24), []

    class Evaluator(InstantEvaluator):
        width = gpus

        def _advance(self):
            most.append(study.in_flight)
            return super()._advance() if len(self._ready) == 4 * gpus or study.exhausted else []

    evaluator = Evaluator()
    evaluator.pool.size = 40
    search([study], evaluator)
    assert max(most) == 4 * gpus


def test_failures_do_not_stop_the_search(tmp_path):
    def judge(task):
        if task.candidate.config["block_n"] == 64:
            return Outcome(Kind.LAUNCH_ERROR, detail="too many resources requested")
        return timed(landscape(task.candidate.config))

    study = open_study(tmp_path, trials=30)
    search([study], InstantEvaluator(judge))
    assert study.counts[Kind.LAUNCH_ERROR] > 0
    assert study.best.time_us < landscape(config(block_n=32))


def test_progress_tells_how_far_it_is():
    def progress(phase="search", elapsed=30.0, budget=120.0, evaluated=4, finals=0):
        study = StudyStatus("indexer.triton", "heads64", evaluated, 40, 5.0, 6.0, {Kind.OK: evaluated}, False)
        return Progress(phase, elapsed, budget, (study,), finals, 2)

    assert progress().fraction == pytest.approx(0.25)
    assert progress().eta_s == pytest.approx(90)
    assert progress(budget=None).fraction == pytest.approx(0.09)
    assert progress(evaluated=40).fraction == pytest.approx(0.9)
    assert progress("finals", evaluated=40, finals=1).fraction == pytest.approx(0.95)
    assert progress("done").fraction == 1.0
    assert progress().counts[Kind.OK] == 4
    assert CASE.sizes.queries == 4096
