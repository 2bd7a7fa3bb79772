"""Efforts: what each may take, and which calls a quick one keeps to."""

from __future__ import annotations

import dataclasses

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import NoConfig, UnknownName
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.paths import shipped_records
from dsa_codegen.problem.op import Case
from dsa_codegen.records.files import merge, path_of, read
from dsa_codegen.tune import run
from dsa_codegen.tune.effort import EFFORTS, NORMAL, QUICK, THOROUGH, effort, most_needed
from dsa_codegen.tune.plan import problems
from dsa_codegen.tune.problem import Problem

from support import H200
from toy import OP
from tune_support import SPEC


def test_a_quick_effort_keeps_to_what_is_needed_most(go, tmp_path):
    """The dearest call of each kind; another one where that has a record."""
    first, second = go(effort=QUICK), go(effort=QUICK)
    (one,), (two,) = first.records, second.records
    assert one.sizes == {"queries": 4096, "context": 32768} and two.sizes == {"queries": 4096, "context": 8192}
    assert first.notes == ("effort quick: 1 of 4 calls, the dearest of each kind without a record",)
    assert first.missing == ()


def test_what_is_missing_is_searched_alone(go, tmp_path):
    """A call with a record of its own is left as it is; where every call has one, nothing is searched."""
    go(effort=QUICK)
    rest = go(missing=True)
    assert len(rest.records) == 3 and {"queries": 4096, "context": 32768} not in [record.sizes for record in rest.records]
    assert rest.notes[0] == "3 of 4 calls have no record of their own"
    nothing = go(missing=True)
    assert nothing.records == nothing.missing == () and nothing.notes[0] == "0 of 4 calls have no record of their own"


@pytest.mark.parametrize(("beside", "serves"), [(2.0, True), (0.5, False)])
def test_a_call_is_missing_where_its_record_is_passed_over(tmp_path, monkeypatch, beside, serves):
    """Another backend's, say, that was slower than the default beside it."""
    monkeypatch.setattr(run, "search_path", dict)
    op = ops.get("select")
    record = next(each for each in read(path_of(shipped_records(), "h200", op.name)) if each.backend == "tilelang")
    merge(tmp_path, [dataclasses.replace(record, default_time_us=beside * record.time_us.median)])
    sizes = op.sizes_type(**record.sizes)
    problem = Problem(op, op.spec_type.from_dict(record.spec), Case(sizes, "normal"), H200)
    assert run._is_served(problem, tmp_path) is serves


def test_a_call_that_no_kernel_serves_is_missing_too(tmp_path, monkeypatch):
    """Why none does is noted when its study is to be opened."""
    monkeypatch.setattr(run, "search_path", dict)
    op = ops.get("indexer")  # of FP8, which comes with sm_89
    spec = IndexerSpec(64, 128)
    with pytest.raises(NoConfig):
        op.default_config(spec, IndexerSizes(64, 8192), resolve("a100"))
    assert not run._is_served(Problem(op, spec, Case(IndexerSizes(64, 8192), "causal"), resolve("a100")), tmp_path)


def test_a_quick_effort_leaves_out_what_a_step_does_not_notice():
    wanted = problems([(OP, SPEC)], H200)
    cost = {problem.id: OP.cost(SPEC, problem.case).limit_us(H200) for problem in wanted}
    other = dataclasses.replace(wanted[0], spec=IndexerSpec(8, 32), case=Case(IndexerSizes(8, 64), "causal"))
    assert [problem.id for problem in most_needed([*wanted, other], lambda problem: False)] == [max(cost, key=cost.get)]
    assert most_needed([other], lambda problem: True) == [other], "where everything is served, all is"


@pytest.mark.parametrize("name", EFFORTS)
def test_every_effort_has_budgets(name):
    chosen = effort(name)
    assert chosen.budget(offline=True).trials < chosen.budget(offline=False).trials
    assert QUICK.on_gpu.wall_s + 12 <= 60 < NORMAL.on_gpu.wall_s == 600 < THOROUGH.on_gpu.wall_s
    with pytest.raises(UnknownName, match="quick, normal, thorough"):
        effort("enough")
