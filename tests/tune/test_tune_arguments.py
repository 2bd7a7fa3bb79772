"""What a tuning run refuses before it touches anything: arguments, folders and files that it could not use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsa_codegen.errors import DsaError, InputError, RecordError
from dsa_codegen.records import files as records
from dsa_codegen.tune.plan import Budget

from tune_support import InstantGpu, contents


def test_an_unreadable_file_stops_the_run_before_it_begins(go, tmp_path):
    path = records.path_of(tmp_path / "tuned", "h200", "indexer")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    evaluator = InstantGpu()
    with pytest.raises(RecordError, match=r"indexer\.json"):
        go(evaluator)
    assert not evaluator.judged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 99999999999999999}, "seed: got 99999999999999999; expected 0 to 2147483647"),
        ({"seed": -1}, "seed"),
        ({"processes": 0}, "processes"),
        ({"budget": Budget(-1.0, 8)}, "budget"),
        ({"budget": Budget(float("nan"), 8)}, "budget"),
        ({"budget": Budget(1.0, 0)}, "trials"),
        ({"backends": ("cutlass",)}, "unknown backend"),
        ({"state": Path("/dev/null/.tune")}, "state: got /dev/null/.tune; expected a folder that can be written"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_arguments_are_checked_before_anything_is_touched(go, one_bucket, tmp_path, options, words):
    go()
    before = contents(tmp_path)
    with pytest.raises(DsaError, match=re.escape(words)):
        go(fresh=True, **options)
    assert contents(tmp_path) == before, "no journal is blamed for an argument"


def test_a_folder_that_cannot_be_written_is_found_before_the_search(go, one_bucket, tmp_path):
    (tmp_path / "tuned").write_text("a file")
    evaluator = InstantGpu()
    with pytest.raises(InputError, match="tuned is not a folder"):
        go(evaluator)
    assert not evaluator.judged and not (tmp_path / ".tune").exists()
