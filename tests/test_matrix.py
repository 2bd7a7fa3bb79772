"""The table of what compiles with what holds for the templates of today."""

from __future__ import annotations

import pytest

from dsa_codegen import paths

import table as tables
from subjects import COMPILERS, TRITONS, subjects

TABLE = tables.load()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_template_is_newer_than_its_line(compiler):
    """Lines that were never whole are named on the page; one that was stays so, and once all were there are no others."""
    waiting = set(TABLE.waiting().get(compiler, ())) - set(TABLE.not_whole.get(compiler, ()))
    newer = waiting & TABLE.lines.get(compiler, {}).keys() if TABLE.not_whole else waiting
    assert not newer, f"run {tables.COMMAND} --triton {compiler}"


def test_nothing_is_refused():
    assert not [line.refused for lines in TABLE.lines.values() for line in lines.values() if line.refused]


def test_the_page_is_of_the_file():
    assert tables.PAGE.read_text() == tables.page(TABLE)


def test_every_template_is_asked_for():
    asked = {key[0] for compiler in COMPILERS for key in subjects(compiler)}
    assert asked == {path.relative_to(paths.templates()).as_posix() for path in paths.templates().glob("*/*.py.jinja")}


def test_another_text_is_missing_and_a_result_fills_its_place():
    table, (key, *_) = tables.Table(), subjects("3.8")
    assert len(table.missing("3.8")) == len(subjects("3.8")) and set(table.waiting()) == set(COMPILERS)
    table.add("3.8", key, "no such instruction", "0123abc", "2026-01-01")
    assert not table.holds("3.8", key) and f"| {key[2]} {key[1]} | no such instruction |" in tables.page(table)
    table.add("3.8", key, "", "0123abc", "2026-01-01")
    table.add("3.8", (key[0], "of yesterday", key[2]), "", "0123abc", "2026-01-01")
    table.prune()
    assert table.holds("3.8", key) and table.lines["3.8"][key[0]].compiled == {key[2]: [key[1]]}


def test_every_triton_has_texts_of_its_own_where_names_differ():
    gluon = [{key for key in subjects(release) if "gluon" in key[0]} for release in TRITONS]
    assert gluon[0] != gluon[1] and gluon[2] != gluon[3]
