"""The script that runs compute-sanitizer: its pieces cover what was asked for, and its verdicts are the tool's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/sanitize.py"
KINDS = [("select", "cuda")] * 20 + [("select", "triton")] * 3 + [("indexer", "gluon")]


@pytest.fixture(scope="module")
def sanitize():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sanitize"]


CASES = 30  # of a source


def subject(op, backend):
    """What the script asks of a source."""
    cases = list(range(CASES))
    named = SimpleNamespace(name=op, cases_for=lambda *_: cases, cases=lambda _: cases, within_reach=lambda *each: each[-1])
    return SimpleNamespace(op=named, spec=None, config=SimpleNamespace(backend=backend))


SUBJECTS = [subject(op, backend) for op, backend in KINDS]


def test_every_case_lies_in_one_piece_of_every_tool(sanitize):
    for tool in sanitize.TOOLS:
        found = [piece for piece in sanitize.pieces(SUBJECTS, sanitize.TOOLS, (), ()) if piece.tool == tool]
        mine = [sanitize.all_cases(sanitize.of(SUBJECTS, piece.op, piece.backend), tool) for piece in found]
        shares = [cases[piece.share :: piece.shares] for cases, piece in zip(mine, found, strict=True)]
        told = [(id(source), case) for share in shares for source, case in share]
        assert sorted(told) == sorted((id(source), case) for source in SUBJECTS for case in range(CASES))
        assert max(map(len, shares)) <= sanitize.TOGETHER[tool]


def test_pieces_may_be_chosen(sanitize):
    found = sanitize.pieces(SUBJECTS, ["racecheck"], ["select"], ["triton"])
    assert [piece.name for piece in found] == [f"racecheck-select-triton-{share}of3" for share in (1, 2, 3)]


RACES = """========= Error: Race reported between Read access at k+0x100 in m.py:1
=========     and Write access at k+0x3290 in m.py:2 [8 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("script", "verdict", "cases"),
    [
        ("echo verified 7 cases; echo ========= ERROR SUMMARY: 0 errors", "clean", 7),
        ("echo verified 7 cases; echo ========= ERROR SUMMARY: 3 errors; exit 9", "3 errors", 7),
        ("echo '========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'; exit 9", "2 errors", 0),
        ("echo verified 3 cases; cat RACES; exit 9", "clean but for 1 reports of what is in order", 3),
        ("echo verified 3 cases; sed s/m.py:2/m.py:3/ RACES; exit 9", "1 errors", 3),
        ("echo no device; exit 1", "failed", 0),
        ("echo ========= ERROR SUMMARY: 0 errors", "failed", 0),
        ("sleep 5", "timeout", 0),
    ],
)
def test_a_verdict_is_the_tools(sanitize, tmp_path, monkeypatch, script, verdict, cases):
    monkeypatch.setattr(sanitize.paths, "cache", lambda: tmp_path)
    sanitize.line_of.cache_clear()
    (tmp_path / "build").mkdir()
    (tmp_path / "build/m.py").write_text("def indexer_paged(\n    gl.warp_specialize(\n    other.store(x)\n")
    (tmp_path / "RACES").write_text(RACES)
    command = ["sh", "-c", script.replace("RACES", str(tmp_path / "RACES"))]
    outcome = sanitize.check(sanitize.Piece("racecheck", "indexer_paged", "gluon", 0, 1), command, 0.5, tmp_path)
    assert (outcome.verdict, outcome.cases) == (verdict, cases)
    assert (tmp_path / "racecheck-indexer_paged-gluon-1of1.txt").exists()


def test_only_our_kernels_are_looked_at(sanitize):
    piece = sanitize.Piece("synccheck", "select", "cuda", 0, 2)
    command = sanitize.command_of(piece, {"select_row"}, ["tiny", "tiny-gqa"], "--kernel-name")
    assert command[command.index("--kernel-name") :][:2] == ["--kernel-name", "kns=select_row"]
    assert command.count("--preset") == 2
    assert command[command.index("--piece") :] == ["--piece", "synccheck", "select", "cuda", "0", "2"]


TRAINING = ("attention_backward", "attention_dense", "indexer_backward")


def test_operations_of_training_and_of_grouped_queries_have_pieces(sanitize):
    """By name and where none is named; in CUDA C++ of many heads too."""
    gpu, names = sanitize.resolve("h200"), [*TRAINING, "attention_gqa"]
    named = sanitize.sources(sanitize.MODELS, gpu, names)
    assert {(each.op.name, each.config.backend) for each in named} == {
        *((name, "triton") for name in names),
        ("attention_dense", "cuda"),
    }
    assert sanitize.sources(["tiny-gqa"], gpu, ["select"]), "few blocks are chosen, and some of them kept"


def test_where_none_is_named_all_are_checked(sanitize, monkeypatch):
    """Sources are made for serving's and for training's operations, of every model."""
    asked = []
    monkeypatch.setattr(sanitize, "sources_of", lambda model, gpu, names: asked.append((model.name, set(names))) or [])
    sanitize.sources(sanitize.MODELS, sanitize.resolve("h200"))
    assert asked == [(name, set(sanitize.ops.all_ops())) for name in sanitize.MODELS]


LISTING = """
//--------------------- .text.attention --------------------------
	//## File "/b/kernels.cu", line 1 inlined at "/b/kernels.cu", line 3
	//## File "/b/kernels.cu", line 3
        /*0010*/                   LDS.128 R20, [R110+UR12] ;
        /*0020*/                   IMAD R1, R1, R1, R1 ;
	//## File "/usr/include/intrinsics.hpp", line 900 inlined at "/b/kernels.cu", line 4
	//## File "/b/kernels.cu", line 4
        /*0030*/              @!P5 LDGSTS.E.128 [R21], desc[UR6][R50.64], !P6 ;
        /*0040*/                   STS [R21], R20 ;
"""
TEXT = ["asm(ld.shared);", "asm(st.shared);", "store16(target, load16(from), pass);", "copy_rows(copy16);"]


def test_lines_are_read_off_a_listing(sanitize):
    found = sanitize.source_lines.read(LISTING, TEXT)
    assert found["attention", 0x10] == ("LDS", (TEXT[0], TEXT[2]))
    assert found["attention", 0x30] == ("LDGSTS", (TEXT[3],))
    assert found["attention", 0x40] == ("STS", (TEXT[3],))


@pytest.mark.parametrize(
    ("first", "second", "builds", "known"),
    [
        ("Read access at attention+0x10", "Write access at attention+0x30", "a", True),
        ("Read access at attention+0x10", "Write access at attention+0x40", "a", True),
        ("Read access at attention+0x10", "Write access at attention+0x50", "a", False),  # of no build
        ("Write access at attention+0x10", "Read access at attention+0x30", "a", False),
        ("Read access at attention+0x10", "Write access at attention+0x30", "ab", False),  # b's are other lines
        ("Read access at attention+0x10", "Write access at attention+0x40", "ab", True),  # and nothing is stored there
        ("Read access at other+0x10", "Write access at other+0x30", "a", False),
    ],
)
def test_reports_in_cuda_are_known_by_the_lines_of_every_build_they_may_be_of(
    sanitize, monkeypatch, first, second, builds, known
):
    lines = sanitize.source_lines
    found = {"a": lines.read(LISTING, TEXT), "b": lines.read(LISTING.replace(" STS", " LDS"), ["x"] * 4)}
    monkeypatch.setattr(lines, "places", lambda folder, gpu: found[folder])
    monkeypatch.setattr(lines, "instructions", lambda folder: {at: name for at, (name, _) in found[folder].items()})
    race = f"Race reported between {first}\n=========     and {second} [8 hazards]"
    piece = sanitize.Piece("racecheck", "attention", "cuda", 0, 1)
    assert sanitize.in_order(piece, race, [SimpleNamespace(folder=name, gpu=None) for name in builds]) == known


@pytest.mark.parametrize(("address", "known"), [("0x20", True), ("0x10", False), ("0x50", False)])
def test_reads_from_a_block_that_waits_are_known_by_their_line(sanitize, monkeypatch, address, known):
    """The tool knows the cluster's barrier only; here a block waits for a word of those that read from it."""
    lines = sanitize.source_lines
    found = lines.read(LISTING.replace("IMAD", "LD.E.128"), ["x", "y", "uint4 x = load_remote4(theirs);", "z"])
    monkeypatch.setattr(lines, "places", lambda folder, gpu: found)
    monkeypatch.setattr(lines, "instructions", lambda folder: {at: name for at, (name, _) in found.items()})
    said = f"""========= Potential invalid __shared__ read of size 16 bytes
=========     at attention+{address}
=========     Address 0x1000420 is located in a block that might have already exited
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
    (report,) = sanitize._RACE.findall(said)
    piece = sanitize.Piece("racecheck", "select", "cuda", 0, 1)
    assert sanitize.in_order(piece, report, [SimpleNamespace(folder="a", gpu=None)]) == known
