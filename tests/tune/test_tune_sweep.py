"""Sweeps: every config is visited, failures are told by kind, what falls with a process is entered again; a file holds all."""

from __future__ import annotations

import dataclasses

import pytest

from dsa_codegen.errors import InputError
from dsa_codegen.tune import sweep as sweeps
from dsa_codegen.tune import sweeping
from dsa_codegen.tune.pool import CompilePool

import sweep_jobs
from support import H200
from toy import OP
from tune_jobs import landscape
from tune_support import CASE, SPACE, SPEC

TABLE = sweeping.Table(sweep_jobs.prepare, sweep_jobs.enter, sweep_jobs.visit, sweep_jobs.leave)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with CompilePool(H200, folder, 1, compile=sweep_jobs.compile_quickly) as pool:
        return sweeping.sweep(OP, SPEC, [CASE], pool, SPACE, visits=3, table=TABLE)


def test_every_config_is_visited_or_says_why_not(swept):
    assert {entry.config for entry in swept.entries} == set(SPACE.feasible())
    (case,) = swept.cases
    failed = [result for result in case.results if isinstance(result, str)]
    assert sorted(failed) == ["launch_error", "mismatch", "mismatch", "mismatch"]
    for entry, result in zip(swept.entries, case.results, strict=True):
        if sweep_jobs.fails(entry.config):
            continue
        far = landscape(entry.config) > 4 * min(landscape(other.config) for other in swept.entries)
        assert result == (landscape(entry.config),) * (1 if far else 3)


def test_configs_of_one_text_share_a_source(swept):
    without_splits = {entry.config.replace(splits=1) for entry in swept.entries}
    assert len(swept.sources) == len(without_splits)
    assert {each.mix["indexer"]["loops"] for each in swept.sources} == {7}


def test_a_file_holds_all_of_it(swept, tmp_path):
    path = tmp_path / "sweep.json"
    swept.write(path)
    again = sweeps.read(path)
    assert (again.entries, again.gpu, again.spec) == (swept.entries, swept.gpu, swept.spec)
    assert [p.choices for p in again.table] == [p.choices for p in swept.table]
    assert again.sources == tuple(dataclasses.replace(each, compile_s=round(each.compile_s, 2)) for each in swept.sources)
    for number, entry in enumerate(swept.entries):
        if not sweep_jobs.fails(entry.config):
            assert again.cases[0].time_us(number) == pytest.approx(landscape(entry.config), rel=1e-3)
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 9}'])
def test_what_is_no_sweep_is_refused(text, tmp_path):
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(InputError, match=r"scripts/sweep\.py"):
        sweeps.read(tmp_path / "no.json")
