"""Token selection in CUDA C++: blocks, clusters and rows that stream, on a CPU and as the compiler makes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.errors import InputError
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.select import OP, SelectSizes, SelectSpec, streamed
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.verify import verify

import emulator
from select_configs import CUDA, FAR, NEAR, PLAIN, SLOTS, STREAMED
from support import FURTHER, H200, assert_compiles

IN_A_BLOCK = [
    (PLAIN, {"early": False}),
    (SLOTS, {"early": True, "digit_bits": 11}),
    (replace(PLAIN, output="slots", page=8, keep_first=5), {"early": False, "items": 64}),
]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize(("spec", "changes"), IN_A_BLOCK, ids=["tokens", "slots", "halves"])
def test_cuda_matches_the_reference(spec, changes, order, tmp_path):
    """One block's kernel; clusters have a module of their own."""
    config = CUDA.replace(**{"threads": 256, "items": 4, **changes})
    variant = Variant(OP, spec, config, H200, emulator.cuda_kernels(render(OP, spec, config), tmp_path, order))
    for case in OP.cases(spec):
        accuracy = verify(variant, OP.within_reach(spec, config, case), "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


LONG = [Case(SelectSizes(2, 9001), kind) for kind in ("ragged_normal", "ragged_special", "relu")]
IN_A_STREAM = [
    (PLAIN, {}, 5, "ascending"),
    (replace(SLOTS, starts=True), {"items": 16}, 5, "shuffled"),
    (replace(SLOTS, scores="fp32", topk=700, keep_first=300, keep_recent=400), {"stages": 3}, -0.6, "descending"),
    (replace(SLOTS, scores="fp32"), {"items": 32, "longest": FAR}, 5, "shuffled"),
    (PLAIN, {"persistent": True, "stages": 3}, 5, "shuffled"),
    (replace(SLOTS, starts=True), {"persistent": True, "items": 16}, -0.6, "descending"),
    pytest.param(
        PLAIN, {"items": 32, "threads": 256, "blocks_per_sm": 2, "longest": FAR // 2}, 5, "descending", marks=pytest.mark.slow
    ),
]
VERY_LONG = [Case(SelectSizes(1, columns), kind) for columns, kind in ((300001, "ragged_normal"), (FAR, "few"))]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "changes", "margin", "order"),
    IN_A_STREAM,
    ids=["tokens", "slots", "wrong-guess", "far", "stays", "stays-wrong-guess", "two-an-sm"],
)
def test_a_row_that_streams_matches_the_reference(spec, changes, margin, order, tmp_path, monkeypatch):
    """Also where the pool overflows (a third of LONG), and where the sample asks for too few, so that rows are read twice."""
    monkeypatch.setattr(streamed, "_MARGIN", margin)
    config = STREAMED.replace(**changes)
    assert not OP.violations(spec, config, H200)
    gpu = replace(H200, sms=1) if config["persistent"] else H200
    variant = Variant(OP, spec, config, gpu, emulator.cuda_kernels(render(OP, spec, config), tmp_path, order))
    far = [OP.within_reach(spec, config, case) for case in VERY_LONG] if config["longest"] > NEAR else []
    for case in [*OP.cases(spec)[::4], *LONG, *far]:
        accuracy = verify(variant, case, "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_block_that_stays_matches_the_reference(order, tmp_path):
    """For rows that are not aligned, which it loads itself; what the copy engine brings needs a GPU."""
    config = CUDA.replace(threads=256, items=4, early=False, persistent=True)
    kernels = emulator.cuda_kernels(render(OP, PLAIN, config), tmp_path, order)
    variant = Variant(OP, PLAIN, config, replace(H200, sms=1), kernels)
    cases = [case for case in OP.cases(PLAIN) if case.distribution.startswith("ragged")]
    assert all((case.sizes.columns + 5) % 4 and case.sizes.rows > 2 for case in cases)
    for case in cases:
        accuracy = verify(variant, case, "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


HELD = [
    (replace(PLAIN, topk=512), "shuffled"),
    (replace(SLOTS, scores="fp32", starts=True), "descending"),
    (replace(PLAIN, topk=1023, keep_first=1, keep_recent=700), "ascending"),
    (replace(PLAIN, topk=1023, keep_first=512, keep_recent=256), "shuffled"),
]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(("spec", "order"), HELD, ids=["tokens", "slots", "kept", "kept-whole-chunks"])
def test_rows_of_which_half_stays_in_shared_memory_match_the_reference(spec, order, tmp_path):
    """Of one block, so that rows come while others are looked at; aligned ones are brought, others loaded."""
    config = CUDA.replace(threads=256, items=32, early=False, persistent=True, ring=2)
    assert not OP.violations(spec, config, H200)
    variant = Variant(OP, spec, config, replace(H200, sms=1), emulator.cuda_kernels(render(OP, spec, config), tmp_path, order))
    kinds = ("normal", "relu", "equal", "few", "up", "down", "narrow", "special")
    whole = [Case(SelectSizes(3, 16384), kind) for kind in kinds]
    ragged = [Case(SelectSizes(5, 16384 - 13), f"ragged_{kind}") for kind in kinds]
    for case in [*whole, *ragged, *OP.cases(spec)]:
        accuracy = verify(variant, OP.within_reach(spec, config, case), "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


EXTREMES = (torch.inf, 3e38, 1.0, 1e-39, 0.0, -0.0, -1e-39, -1.0, -3e38, -torch.inf, torch.nan)


def row_around(score, higher, count, lower, drawn, columns=16384):
    """A row that is to be chosen down to one of ``count`` scores: ``score``, or up to a quarter more where these are few."""
    around = torch.full((count,), score) * (1 + torch.rand(count, generator=drawn).div(4) * (count == 100))
    row = torch.cat([higher, around, torch.tensor(lower).repeat(columns)[: columns - len(higher) - count]])
    return row[torch.randperm(columns, generator=drawn)]


def chosen_of(rows, topk, folder):
    """(what is chosen of a row each, the reference's), by one block with half of a row in shared memory."""
    config = CUDA.replace(threads=256, items=32, early=False, persistent=True, ring=2)
    spec, gpu = replace(PLAIN, topk=topk), replace(H200, sms=1)
    variant = Variant(OP, spec, config, gpu, emulator.cuda_kernels(render(OP, spec, config), folder, "shuffled"))
    ends = torch.full((len(rows),), rows[0].numel(), dtype=torch.int32)
    inputs = {"scores": torch.stack(rows), "starts": torch.zeros_like(ends), "ends": ends, "page_table": None}
    return variant.run(inputs, OP.allocate(spec, inputs))["chosen"], OP.reference(spec, inputs)["chosen"]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_the_last_chosen_score_may_be_any(tmp_path):
    """A row for each of EXTREMES and of how many equal or nearly equal it: compared, listed, counted, or no numbers."""
    drawn = torch.Generator().manual_seed(7)
    rows = []
    for at, extreme in enumerate(EXTREMES):
        for count in (100, 600, 1024, 1025, 1500):
            higher = torch.tensor(EXTREMES[:at] or (torch.inf,)).repeat(500)[: 460 if at else 0]
            rows.append(row_around(extreme, higher, count, (*EXTREMES[at + 1 :], torch.nan), drawn))
    chosen, reference = chosen_of(rows, 512, tmp_path)
    assert torch.equal(chosen, reference)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_scores_of_one_bin_are_told_apart(tmp_path):
    """A plateau that is chosen as a whole, with others below it in its bin; scores where bins begin; few that differ."""
    drawn = torch.Generator().manual_seed(8)
    higher, below = torch.rand(100, generator=drawn) + 2, (1 - 2**-23, 0.99999, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0)
    rows = [row_around(1.0, higher, count, below[: 2 + more], drawn) for count in (1948, 1947, 1949) for more in range(7)]
    rows += [row_around(1.0, torch.rand(1124, generator=drawn) + 2, count, below[2:], drawn) for count in (1024, 1025, 1026)]
    rows += [torch.randint(0, steps, (16384,), generator=drawn).float() for steps in (1024, 2048, 4096, 8192)]
    rows += [1 + torch.randint(0, steps, (16384,), generator=drawn) * 2**-23 for steps in (3, 40, 700)]
    chosen, reference = chosen_of(rows, 2048, tmp_path)
    assert torch.equal(chosen, reference)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("columns", [1400, 16384])
def test_a_sample_of_the_highest_scores_alone(columns, tmp_path):
    """The k-th score lies below all that is sampled: one of a plateau, of few behind one, of many that differ."""
    drawn = torch.Generator().manual_seed(9)
    token = torch.arange(columns)
    sampled = torch.zeros(columns, dtype=torch.bool)
    sampled[((token[:64] * columns) // 64)[:, None] + token[:4]] = True
    rows = []
    for plateau in (0, 1, 200, 255, 256, 257, 600):
        row = torch.rand(columns, generator=drawn)
        row[torch.randperm(columns, generator=drawn)[:plateau]] = 1.0
        row[sampled] = 2 + torch.rand(256, generator=drawn)
        rows.append(row)
    chosen, reference = chosen_of(rows, 512, tmp_path)
    assert torch.equal(chosen, reference)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_many_keys_of_one_digit_match_the_reference(tmp_path):
    """More than four a thread: of one value, found at once, and of many, counted in turn."""
    config = CUDA.replace(threads=256, items=32, early=False, digit_bits=11)
    kernels = emulator.cuda_kernels(render(OP, PLAIN, config), tmp_path, "shuffled")
    for kind in ("equal", "relu", "narrow", "few", "special", "ragged_equal", "ragged_narrow"):
        accuracy = verify(Variant(OP, PLAIN, config, H200, kernels), Case(SelectSizes(2, 3001), kind), "cpu", repeats=2)
        assert accuracy.passed, (kind, accuracy.detail)


DECODE = SelectSpec(2048, starts=False, output="slots")
# What serves; two blocks an SM with 32 scores a thread and the pages beside them spill, and are the fastest nevertheless.
GEOMETRIES = [
    (DECODE, SelectSizes(1, 8192), 0),
    pytest.param(DECODE, SelectSizes(64, 8192), 0, marks=FURTHER),
    pytest.param(DECODE, SelectSizes(8, 65536), 0, marks=FURTHER),
    pytest.param(DECODE, SelectSizes(1, 131072), 0, marks=FURTHER),
    pytest.param(DECODE, SelectSizes(128, 32768), 48, marks=FURTHER),
    (SLOTS, SelectSizes(64, 65536), 32),
    (SelectSpec(2048), SelectSizes(4096, 8192), 0),
    pytest.param(SelectSpec(4096, scores="bf16"), SelectSizes(4096, 32768), 8, marks=FURTHER),
    pytest.param(replace(DECODE, page=1, keep_first=2), SelectSizes(8, 32768), 0, marks=FURTHER),
]
STREAMS = [
    (DECODE, SelectSizes(64, 131072)),
    pytest.param(SelectSpec(4096, scores="bf16"), SelectSizes(128, 65536), marks=FURTHER),
    pytest.param(DECODE, SelectSizes(64, FAR), marks=FURTHER),
    pytest.param(SelectSpec(2048), SelectSizes(4096, 65536), marks=FURTHER),
]


@pytest.mark.parametrize(("spec", "sizes", "spills"), GEOMETRIES, ids=lambda value: getattr(value, "id", ""))
def test_cuda_compiles_for_hopper(spec, sizes, spills):
    """Also that the shared memory which the launch asks for is the size of what the text declares."""
    config = OP.default_config(spec, sizes, H200, "cuda")
    assert_compiles(OP, spec, config, spills=spills)


@pytest.mark.parametrize("columns", [pytest.param(8192, marks=FURTHER), pytest.param(16384, marks=FURTHER), 32768])
def test_rows_of_which_half_stays_in_shared_memory_compile_for_hopper(columns):
    """Without a word spilled: beside the blocks' shared memory no L1 is left for it, and 8 bytes cost 5 % (H200)."""
    guesses = OP.guesses(SelectSpec(2048), SelectSizes(4096, columns), H200)
    assert_compiles(OP, SelectSpec(2048), next(each for each in guesses if each.backend == "cuda" and each["ring"]))


@pytest.mark.parametrize(("spec", "sizes"), STREAMS, ids=["cluster", "block", "far", "two-an-sm"])
def test_a_row_that_streams_compiles_for_hopper(spec, sizes):
    config = OP.default_config(spec, sizes, H200)
    assert config["stages"]
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize("digit_bits", [11, 12])
@pytest.mark.parametrize("cluster", [1, 2, 16])
@pytest.mark.parametrize("spec", [SelectSpec(77, scores="bf16"), replace(DECODE, page=48)], ids=lambda spec: spec.output)
def test_cuda_renders_for_all_options(spec, cluster, digit_bits):
    config = CUDA.replace(cluster=cluster, digit_bits=digit_bits, early=False)
    for each in (config, config.replace(early=True), config.replace(persistent=True)):
        text = render(OP, spec, each).code
        assert ("cluster_wait" in text) == (cluster > 1)
        assert ("cp.async.bulk" in text) == each["persistent"]
        assert ("page_table + " in text) == (spec.output == "slots")


def launch(config, rows=6, columns=300, **changes):
    """The one launch of a config."""
    spec = replace(SLOTS, starts=True, **changes)
    inputs = OP.inputs(spec, Case(SelectSizes(rows, columns), "ragged_normal"), Draw(0))
    (launched,) = OP.launches(spec, config, inputs, OP.allocate(spec, inputs), H200)
    return inputs, launched


@pytest.mark.parametrize(
    ("changes", "rows", "blocks"),
    [({}, 6, 6), ({"cluster": 8}, 6, 48), ({"persistent": True, "early": False, "blocks_per_sm": 2}, 999, 264)],
    ids=["row", "cluster", "persistent"],
)
def test_cuda_launches(changes, rows, blocks):
    inputs, launched = launch(CUDA.replace(**changes), rows=rows)
    assert launched.grid == (blocks, 1, 1)
    table = inputs["page_table"]
    assert launched.args[:3] == (inputs["scores"], 305, inputs["starts"])
    assert launched.args[4:7] == (table, table.stride(0), rows // len(table))
    assert launched.args[8:] == (300, rows)
    without = launch(CUDA, output="tokens")[1].args
    assert without[4:7] == (0, 0, 1)


def test_a_forced_config_refuses_rows_that_it_cannot_hold():
    with pytest.raises(InputError, match=r"^scores.*8193 columns.*at most 8192"):
        launch(CUDA, rows=1, columns=8193)
