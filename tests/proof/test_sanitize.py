"""The script that runs compute-sanitizer: its pieces cover what was asked for, are resumed, and end as the tool says."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsa_codegen.errors import ToolBroken
from dsa_codegen.ops.attention_paged import OP as PAGED
from dsa_codegen.problem.draw import Draw
from scripts.sanitizing import cases, child, ledger, pieces, reports, runner, source_lines, sources

from support import H200

ROOT = Path(__file__).resolve().parents[2]
SOME = ("quantize", "resolve")


@pytest.fixture(scope="module")
def some():
    """Sources of two operations."""
    return sources.sources(["tiny"], H200, SOME)


def test_every_text_and_every_case_that_launches_is_wanted(some):
    """By default four cases of a text stand for the others, and each case is run with one text or another."""
    few, all_ = (cases.checks(some, cases.TOOLS, H200, thorough) for thorough in (False, True))
    for tool, name in itertools.product(cases.TOOLS, SOME):
        mine, whole = ([each for each in found if (each.tool, each.subject.op.name) == (tool, name)] for found in (few, all_))
        assert {sources.label(each.subject) for each in mine} == {sources.label(each.subject) for each in whole}
        assert {each.id for each in mine} == {each.id for each in whole}
        assert set(Counter(sources.label(each.subject) for each in mine).values()) <= {3, cases.FEW}
        assert set(mine) <= set(whole)
    assert all(cases.launched(each, H200) for each in all_)


def test_a_text_is_run_with_every_sequence_of_its_kernels():
    """Few rows are compared with each other, many are claimed before; both are among the four."""
    found = cases.checks(sources.sources(["tiny"], H200, ["latent_prologue"]), ["memcheck"], H200)
    by_text = {sources.label(each.subject): set() for each in found}
    for each in found:
        by_text[sources.label(each.subject)].add(cases.launched(each, H200))
    assert {frozenset(kinds) for kinds in by_text.values()} == {
        frozenset({("latent_prologue",), ("claim", "claim", "latent_prologue")})
    }


@pytest.mark.parametrize(("count", "kinds"), [(3, 1), (16, 1), (16, 6), (20, 2)])
def test_representatives_take_turns(count, kinds):
    own = [f"case{place}" for place in range(count)]

    def kind(case):
        return own.index(case) % kinds

    chosen = [cases.representatives(own, nth, kind) for nth in range(count)]
    assert {case for each in chosen for case in each} == set(own)
    for each in chosen:
        assert len(each) == min(count, max(cases.FEW, kinds)) and sorted(each, key=own.index) == each
        assert {kind(case) for case in each} == set(range(kinds))


def test_pieces_are_short_and_hold_every_check_once(some):
    wanted = cases.checks(some, cases.TOOLS, H200)
    found = pieces.pieces(wanted)
    assert sorted(check.key for piece in found for check in piece.checks) == sorted(check.key for check in wanted)
    assert all(pieces.cost(piece.checks) <= pieces.BUDGET or len(piece.checks) == 1 for piece in found)
    assert max(len(piece.checks) for piece in found) <= 12
    assert len({piece.name for piece in found}) == len(found)
    assert len({(piece.tool, piece.op) for piece in found[:6]}) == 6, "all have begun before one goes on"


def test_what_may_not_end_takes_nothing_with_it():
    """Long cases and texts that are run in another form are in pieces of their own kind."""
    subjects = sources.of(sources.sources(["tiny"], H200, ["attention_paged"]), "attention_paged", "cuda")[::6]
    found = pieces.pieces(cases.checks(subjects, ["memcheck"], H200))
    kinds = [{pieces.may_not_end(check) for check in piece.checks} for piece in found]
    assert {True} in kinds and {False} in kinds and {True, False} not in kinds
    assert all(
        check.long or "block_sync()" in sources.rendered(check.subject).code
        for piece in found
        for check in piece.checks
        if pieces.may_not_end(check)
    )


def test_a_run_goes_on_without_a_backend_that_cannot_compile(some, monkeypatch, capsys):
    def get(name):
        if name == "tilelang":
            raise ToolBroken("tilelang", "ImportError: libother.so", "pip install it")
        return SimpleNamespace(toolchain=dict)

    monkeypatch.setattr(runner.backends, "get", get)
    mine, *others = pieces.pieces(cases.checks(some, ["memcheck"], H200))
    other = dataclasses.replace(mine, backend="tilelang")
    assert runner.with_compilers([other, *others]) == others
    assert f"tilelang: not begun, {len(mine.checks)} cases: " in capsys.readouterr().out


def test_what_has_ended_clean_is_not_run_again(some, tmp_path):
    wanted = cases.checks(some, ["racecheck", "synccheck"], H200)
    first, second, third, *others = pieces.pieces(wanted)
    file = tmp_path / "ended.jsonl"
    ledger.append(file, ledger.line(first, "clean", len(first.checks), 9.0))
    ledger.append(file, ledger.line(second, "2 reports", len(second.checks), 9.0))
    ledger.append(file, ledger.line(second, "clean but for 2 reports of what is in order", len(second.checks), 9.0))
    ledger.append(file, ledger.line(third, "clean", 2, 9.0))  # its time was up
    for piece, verdict in ((others[0], "clean"), (others[0], "1 errors"), (others[1], "1 errors"), (first, "timeout")):
        ledger.append(file, ledger.line(piece, verdict, len(piece.checks) if verdict != "timeout" else 0, 9.0))
    with file.open("a") as written:
        written.write('{"piece": "racecheck-res')  # stopped while it was written
    entries = ledger.read([file, tmp_path / "none"])
    left = {check.key for piece in pieces.pieces(wanted, ledger.ended_clean(entries)) for check in piece.checks}
    assert left == {check.key for piece in [third, *others] for check in piece.checks} - {c.key for c in third.checks[:2]}
    kept = ledger.merged(entries, wanted, "h200")
    assert ledger.ended_clean(kept) == {check.key for check in wanted} - left
    said = "\n".join(ledger.summary(wanted, entries))
    assert "1 errors" in said and said.count("\n") == 3, "a line for each operation and tool"


def test_what_is_kept_is_a_ledger_of_what_there_is():
    """By text, so that a template that changes has nothing clean any more, and is run again."""
    entries = ledger.read([ROOT / "benchmarks/sanitizers/h200.jsonl"])
    kinds = {(name, backend) for name, op in sources.ops.all_ops().items() for backend in op.backends}
    assert {entry["tool"] for entry in entries} == set(cases.TOOLS)
    assert {(entry["op"], entry["backend"]) for entry in entries} <= kinds
    assert len(ledger.ended_clean(entries)) > 1000
    assert len({entry["piece"] for entry in entries}) == len(entries)


def test_further_designs_bring_the_kernels_that_small_models_do_not():
    """All kernels of prompts, clusters whose blocks share entries in all layouts, pooled keys, wide gradients."""
    found = sources.sources(["tiny"], H200, ["attention_paged", "expand", "pool", "attention_backward"])
    paged = sources.of(found, "attention_paged", "cuda")
    wanted = cases.checks(paged, ["racecheck"], H200)
    kernels = {kernel for each in wanted for kernel in cases.launched(each, H200)}
    assert kernels == {"mark", "read_back", "relist", "spread", "sort", "attention", "attention_paged", "combine", "join"}
    sharers = {(each.spec.kv_layout, each.config["sharers"] > 0, each.spec.extra_topk > 0) for each in paged}
    assert {("v32", True, True), ("v4", True, False), ("v4", True, True), ("v41", False, True)} <= sharers
    assert {each.op.name for each in found} == {"attention_paged", "expand", "pool", "attention_backward"}
    assert {each.spec.heads for each in sources.of(found, "attention_backward", "triton")} == {16, 64, 128}


def test_what_the_tools_cannot_follow_runs_in_another_form():
    """Arrivals at a cluster's barrier come directly before their waits; a text is known by what it is."""
    found = sources.of(sources.sources(["tiny"], H200, ["attention_paged"]), "attention_paged", "cuda")
    for subject in found:
        own, run = sources.rendered(subject), sources.run_in_place(subject)
        assert sources.label(subject).startswith(own.sha[:12])
        pairs = zip(own.code.splitlines(), run.code.splitlines(), strict=True)
        changed = [line for before, line in pairs if before != line]
        if subject.config["sharers"] > 1 and subject.config["columns"] == 0:
            arrive, wait = sorted(changed)
            assert arrive == "DEVICE void cluster_arrive() {}"
            assert r"arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" in wait
        else:
            assert not changed and run is own


@pytest.mark.parametrize("tool", cases.TOOLS)
def test_synccheck_is_told_of_barriers_that_the_compiler_counts_as_one(tool):
    """Those of streams, with roles or without, and of no other text; the other tools need not be told."""
    found = sources.of(sources.sources(["tiny"], H200, ["attention_paged"]), "attention_paged", "cuda")
    firsts = {each.subject: each for each in reversed(cases.checks(found, [tool], H200))}
    abreast = set()
    for subject, check in firsts.items():
        told = runner.barriers_of(pieces.Piece(tool, "attention_paged", "cuda", (check,)))
        streams = subject.config["sharers"] == 0 and subject.config["columns"] > 0
        assert told == (["--num-cuda-barriers", "256"] if streams and tool == "synccheck" else [])
        abreast |= {subject.config["placers"]} if streams else set()
    assert abreast == {0, 8, 16}


def test_threads_that_meet_by_several_ways_do_so_by_a_barrier_for_that():
    """``bar.sync`` is one instruction for all that meet; synccheck calls it divergent where groups have one each."""
    found = sources.of(sources.sources(["tiny"], H200, ["attention_paged"]), "attention_paged", "cuda")
    by_ways = [own.code for own in map(sources.rendered, found) if "block_sync()" in own.code]
    assert by_ways
    for code in by_ways:
        assert code.count("auto join_parts") == 1 and code.count("join_parts();") > 1
        assert '"barrier.sync 2, %0;"' in code


def test_blocks_of_a_cache_lie_apart_with_nan_between():
    (subject, *_) = (each for each in sources.sources(["tiny"], H200, ["attention_paged"]) if cases._reads_plain_pages(each))
    check = next(check for check in cases.checks([subject], ["memcheck"], H200) if check.apart and check.case.sizes.tokens > 64)
    given = PAGED.inputs(subject.spec, check.case, Draw(3))
    spaced = cases.operation(check).inputs(subject.spec, check.case, Draw(3))
    assert torch.equal(given["cache"], spaced["cache"]) and not spaced["cache"].is_contiguous()
    blocks, width = given["cache"].flatten(1).shape
    whole = spaced["cache"].as_strided((blocks, width + 64), (width + 64, 1))
    assert whole[:, width:].isnan().all() and not whole[:, :width].isnan().any()
    assert cases.operation(cases.Check("memcheck", subject, subject.op.cases(subject.spec)[0])) is subject.op


def test_what_is_moved_keeps_its_strides_and_what_lies_between():
    wide = torch.arange(60.0).view(3, 20)
    part, packed = wide[:, 2:9], torch.arange(6.0)
    found = child.moved({"part": part, "packed": packed, "scale": 0.5, "none": None, "row": packed[:1].expand(4)}, "cpu")
    assert found["part"].stride() == (20, 1) and torch.equal(found["part"], part) and torch.equal(found["row"], torch.zeros(4))
    assert torch.equal(found["part"].as_strided((47,), (1,)), wide.flatten()[2:49])
    assert torch.equal(found["packed"], packed) and (found["scale"], found["none"]) == (0.5, None)


def test_all_but_the_kernels_runs_on_the_cpu():
    """Inputs are the CPU's of the same seed; what a check is given is moved there."""
    (subject, *_) = sources.sources(["tiny"], H200, ["quantize"])
    op, spec = subject.op, subject.spec
    case, host = op.cases(spec)[0], child.on_host(op)
    inputs = host.inputs(spec, case, Draw(7))
    assert all(torch.equal(inputs[name], value) for name, value in op.inputs(spec, case, Draw(7)).items() if name == "source")
    assert host.check(spec, inputs, host.reference(spec, inputs), op.reference(spec, inputs)).passed
    assert op.inputs.__self__ is op, "the operation itself stays as it is"


RACES = """========= Error: Race reported between Read access at k+0x100 in m.py:1
=========     and Write access at k+0x3290 in m.py:2 [8 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
PIECE = SimpleNamespace(tool="racecheck", op="indexer_paged", backend="gluon", name="one")


@pytest.mark.parametrize(
    ("script", "seen", "verdict", "cases"),
    [
        ("echo ended 7 of 9 checks; echo ========= ERROR SUMMARY: 0 errors", "clean", "clean", 7),
        ("echo ended 7 of 7 checks; echo ========= ERROR SUMMARY: 3 errors; exit 9", "3 reports", "3 errors", 7),
        ("echo '= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'; exit 9", "2 reports", "2 errors", 0),
        (
            "echo ended 1 of 1 checks; echo '= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)'",
            "1 reports",
            "1 errors",
            1,
        ),
        ("echo ended 3 of 3 checks; cat RACES; exit 9", "1 reports", "clean but for 1 reports of what is in order", 3),
        ("echo ended 3 of 3 checks; sed s/m.py:2/m.py:3/ RACES; exit 9", "1 reports", "1 errors", 3),
        ("cat RACES; exit 9", "1 reports", "failed", 0),
        ("echo no device; exit 1", "failed", "failed", 0),
        (
            "echo ended 3 of 3 checks; echo = Warning: Detected overflow of tracked cuda::barrier structures. Results; exit 9",
            "failed",
            "failed",
            3,
        ),
        ("echo ended 3 of 3 checks; exit 1", "failed", "failed", 3),
        ("echo ========= ERROR SUMMARY: 0 errors", "failed", "failed", 0),
        ("sleep 5", "timeout", "timeout", 0),
    ],
)
def test_a_verdict_is_the_tools(tmp_path, monkeypatch, script, seen, verdict, cases):
    monkeypatch.setattr(reports.paths, "cache", lambda: tmp_path)
    reports.line_of.cache_clear()
    (tmp_path / "build").mkdir()
    (tmp_path / "build/m.py").write_text("def indexer_paged(\n    gl.warp_specialize(\n    other.store(x)\n")
    (tmp_path / "RACES").write_text(RACES)
    command = ["sh", "-c", script.replace("RACES", str(tmp_path / "RACES"))]
    status = runner.supervised(command, tmp_path / "said.txt", "racecheck", 0.5, 1)
    text = (tmp_path / "said.txt").read_text()
    assert reports.first_look(status, text) == seen
    assert (reports.judged(PIECE, seen, text, ()), reports.ended(text)) == (verdict, cases)


TOOL = f"""#!{sys.executable}
import os, pickle, sys
if "--help" in sys.argv:
    raise SystemExit(print("  --kernel-name "))
_, piece = pickle.load(open(sys.argv[sys.argv.index("--piece") + 1], "rb"))
kernels = [word for word in sys.argv if word.startswith("kns=")]
print(kernels, "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ)
print(f"ended {{len(piece.checks)}} of {{len(piece.checks)}} checks")
"""


def test_a_run_checks_records_and_goes_on(some, tmp_path, monkeypatch, capsys):
    """With a tool that finds nothing and texts that are there; what it is called with, and what is left for a second run."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(runner, "compile_ahead", lambda *_: subprocess.Popen("true", start_new_session=True))
    monkeypatch.setattr(runner.backends, "get", lambda _: SimpleNamespace(toolchain=dict))
    monkeypatch.setattr(runner, "find", lambda *_: SimpleNamespace(resources={"resolve": None}))
    runner.filter_option.cache_clear()
    (subject, *_) = (each for each in some if each.op.name == "resolve")
    wanted = cases.checks([subject], ["memcheck", "racecheck"], H200)
    first, second = pieces.pieces(wanted)
    out = tmp_path / "out"
    out.mkdir()
    runner.check_all([first], runner.Run(H200, out, 2, 20.0, time.time() + 100))
    entries = ledger.read([out / runner.LEDGER])
    assert [(entry["piece"], entry["verdict"]) for entry in entries] == [(first.name, "clean")]
    assert pieces.pieces(wanted, ledger.ended_clean(entries)) == [second]
    assert (out / f"{first.name}.txt").read_text().splitlines()[0] == "['kns=resolve'] True"
    runner.check_all([second], runner.Run(H200, out, 2, 20.0, time.time() + 2))
    assert f"{second.name}: not begun, {len(second.checks)} cases" in capsys.readouterr().out


def test_operations_of_training_and_of_grouped_queries_are_run():
    """By name and where none is named; in CUDA C++ of many heads too."""
    names = ["attention_backward", "attention_dense", "indexer_backward", "attention_gqa"]
    named = sources.sources(sources.MODELS, H200, names)
    assert {(each.op.name, each.config.backend) for each in named} == {
        *((name, "triton") for name in names),
        ("attention_dense", "cuda"),
    }
    assert sources.sources(["tiny-gqa"], H200, ["select"]), "few blocks are chosen, and some of them kept"


def test_a_model_that_calls_none_of_the_named_operations_has_no_sources():
    """Of grouped queries there are no slots to resolve; the other model's are found."""
    named = sources.sources(["tiny-gqa", "tiny"], H200, ["resolve"])
    assert named and {each.op.name for each in named} == {"resolve"}
    assert not sources.sources(["tiny-gqa"], H200, ["resolve"])


def test_where_none_is_named_all_are_checked(monkeypatch):
    """Sources are made for serving's and for training's operations, of every model."""
    asked = []
    monkeypatch.setattr(sources, "_of_model", lambda model, gpu, names: asked.append((model.name, set(names))) or [])
    monkeypatch.setattr(sources, "FURTHER", ())
    sources.sources(sources.MODELS, H200)
    assert asked == [(name, set(sources.ops.all_ops())) for name in sources.MODELS]


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


def test_lines_are_read_off_a_listing():
    found = source_lines.read(LISTING, TEXT)
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
def test_reports_in_cuda_are_known_by_the_lines_of_every_build_they_may_be_of(monkeypatch, first, second, builds, known):
    lines = source_lines
    found = {"a": lines.read(LISTING, TEXT), "b": lines.read(LISTING.replace(" STS", " LDS"), ["x"] * 4)}
    monkeypatch.setattr(lines, "places", lambda folder, gpu: found[folder])
    monkeypatch.setattr(lines, "instructions", lambda folder: {at: name for at, (name, _) in found[folder].items()})
    race = f"Race reported between {first}\n=========     and {second} [8 hazards]"
    piece = SimpleNamespace(op="attention", backend="cuda")
    assert reports.in_order(piece, race, [SimpleNamespace(folder=name, gpu=None) for name in builds]) == known


@pytest.mark.parametrize(("address", "known"), [("0x20", True), ("0x10", False), ("0x50", False)])
def test_reads_from_a_block_that_waits_are_known_by_their_line(monkeypatch, address, known):
    """The tool knows the cluster's barrier only; here a block waits for a word of those that read from it."""
    lines = source_lines
    found = lines.read(LISTING.replace("IMAD", "LD.E.128"), ["x", "y", "uint4 x = load_remote4(theirs);", "z"])
    monkeypatch.setattr(lines, "places", lambda folder, gpu: found)
    monkeypatch.setattr(lines, "instructions", lambda folder: {at: name for at, (name, _) in found.items()})
    said = f"""========= Potential invalid __shared__ read of size 16 bytes
=========     at attention+{address}
=========     Address 0x1000420 is located in a block that might have already exited
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
    (report,) = reports._RACE.findall(said)
    piece = SimpleNamespace(op="select", backend="cuda")
    assert reports.in_order(piece, report, [SimpleNamespace(folder="a", gpu=None)]) == known
