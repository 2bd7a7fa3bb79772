"""``dsa quality`` end to end: random activations and those of a file, rows for the report, a picture, mistakes."""

from __future__ import annotations

import json

import pytest

import dsa_codegen as dsa
from dsa_codegen import quality
from dsa_codegen.bench import quality as files
from dsa_codegen.bench.report import method
from dsa_codegen.errors import RecordError

from command_line import cli

SMALL = dsa.Model("small", 1, 512, 64, 8, 32, 64)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(a folder with the rows of two contexts, what was printed, the picture)."""
    folder = tmp_path_factory.mktemp("quality")
    quality.save(quality.drawn(SMALL, 96, 4, contexts=[48]), folder / "layer.pt")
    options = ("--context", "48", "--context", "96", "--queries", "4", "--k", "12", "--k", "96", "--json")
    more = ("--out", str(folder), "--plot", str(folder / "by_k.svg"), "--commit", "abc1234")
    shown = cli("quality", "--activations", str(folder / "layer.pt"), *options, *more)
    assert shown.returncode == 0, shown.stderr
    return folder, json.loads(shown.stdout), (folder / "by_k.svg").read_text()


def test_every_context_k_and_choice_has_a_row(written):
    rows = written[1]
    keys = [(row["context"], row["k"], row["choice"]) for row in rows]
    assert sorted(keys) == sorted((c, k, choice) for c in (48, 96) for k in (12, 96) for choice in quality.CHOICES)
    assert all(row["mass"] == pytest.approx(1) for row in rows if row["k"] == 96)


def test_the_picture_stands_alone(written):
    assert written[2].startswith("<?xml") and "--ours:#" in written[2] and "sliding window" in written[2]


def test_the_methods_page_and_table_show_the_rows(written):
    folder = written[0]
    (found,) = files.read(folder)
    assert found["facts"]["commit"] == "abc1234" and found["facts"]["device"] == "CPU"
    page = method.write(folder, folder / "method.html").read_text()
    assert page.count("<svg role=") == 2 and "Quality: random, small" in page
    table = method.quality_tables(folder)["quality"]
    assert table.count("\n| 48 |") == 2 and "100 %" in table


def test_where_nothing_was_measured_there_is_no_page(tmp_path):
    assert method.write(tmp_path, tmp_path / "method.html") is None
    assert method.quality_tables(tmp_path) == {"quality": ""}


def test_a_file_of_something_else_is_told_and_kept(tmp_path):
    (tmp_path / "quality").mkdir()
    for text in ("[]", '{"rows": [{"k": 1}], "facts": {}}'):
        (tmp_path / "quality/random.json").write_text(text)
        with pytest.raises(RecordError, match=r"random\.json"):
            files.read(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--activations", "missing.pt"), "missing.pt"),
        (("--device", "tpu"), "--device"),
        (("--queries", "0"), "--queries"),
        (("--k", "0", "--context", "70", "--preset", "tiny"), "ks"),
    ],
)
def test_mistakes_are_named(options, said, tmp_path):
    shown = cli("quality", *options, cwd=tmp_path)
    assert shown.returncode == 2 and said in shown.stderr
