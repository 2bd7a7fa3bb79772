"""What `tune` prints: what serves now, and which of its choices were not kept."""

from __future__ import annotations

import io

from rich.console import Console
from test_records import make

from dsa_codegen.command import show_tuning, waiting
from dsa_codegen.records import files
from dsa_codegen.records.record import MODELLED
from dsa_codegen.tune.plan import Report


def printed(report: Report) -> str:
    text = io.StringIO()
    show_tuning.tuned(report)(Console(file=text, width=200))
    return text.getvalue()


def test_a_choice_that_a_measured_record_outranks_is_said_and_what_serves_is_shown(tmp_path):
    modelled = make(evidence=MODELLED, time_us=3.3, policy=None, accuracy=None)
    (path,) = files.merge(tmp_path, [make(time_us=1899.0)])
    files.merge(tmp_path, [modelled])
    shown = printed(Report((modelled,), (path,), (), (), False, 1.0))
    assert "1 of 1 choices were not kept" in shown
    assert f"left {path} as it was" in shown.replace("\n", "")
    assert "1899" in shown.replace(",", "")


def test_a_choice_that_is_kept_is_written(tmp_path):
    modelled = make(evidence=MODELLED, time_us=3.3, policy=None, accuracy=None)
    (path,) = files.merge(tmp_path, [modelled])
    shown = printed(Report((modelled,), (path,), (), (), False, 1.0))
    assert "not kept" not in shown
    assert f"wrote {path}" in shown.replace("\n", "")


def test_where_no_terminal_shows_a_bar_lines_say_that_it_goes_on():
    text = io.StringIO()
    log = waiting.logger(Console(file=text), every_s=1000.0)
    log("at once")
    log("too soon")
    assert text.getvalue() == "at once\n"
    log = waiting.logger(Console(file=(shown := io.StringIO()), force_terminal=True))
    log("a bar is there")
    assert not shown.getvalue()
