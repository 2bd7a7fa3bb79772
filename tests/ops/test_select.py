"""Token selection: its kernels against a stable sort, what it refuses, what it compiles to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.command import verification
from dsa_codegen.errors import InputError, NoConfig, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.select import OP, SelectSizes, SelectSpec, streamed
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify

import emulator
from support import FURTHER, H200, assert_compiles, assert_matches_reference

PLAIN = SelectSpec(64)
SLOTS = SelectSpec(77, scores="bf16", starts=False, output="slots", page=48, keep_first=3, keep_recent=17)
ROW = Config.of("triton", scheme="row", capacity=256, block_n=128, sample=256, num_warps=4, splits=1)
SPLIT = ROW.replace(scheme="split", splits=4)
NEAR, FAR = 131072, 1048576
CUDA = Config.of(
    "cuda",
    cluster=1,
    threads=512,
    items=16,
    blocks_per_sm=1,
    digit_bits=12,
    early=True,
    persistent=False,
    stages=0,
    longest=NEAR,
)


@pytest.mark.parametrize("case", OP.cases(PLAIN), ids=lambda case: case.id)
def test_row_matches_the_reference(interpreter, case):
    assert_matches_reference(interpreter, OP, PLAIN, ROW, case)


@pytest.mark.parametrize("case", OP.cases(SLOTS)[::2], ids=lambda case: case.id)
def test_split_matches_the_reference(interpreter, case):
    assert_matches_reference(interpreter, OP, SLOTS, SPLIT, case)


@pytest.mark.parametrize("config", [ROW, SPLIT], ids=["row", "split"])
def test_windows_at_the_ends_of_int32(interpreter, config):
    (case,) = (case for case in OP.cases(SLOTS) if case.distribution == "extreme_normal")
    assert_matches_reference(interpreter, OP, replace(SLOTS, starts=True), config, case, repeats=2)


@pytest.fixture(scope="module", params=["row", "split"])
def tilelang(request):
    """A small TileLang variant, built for Hopper: (spec, config, build)."""
    split = request.param == "split"
    threads = 256 if split else 128  # one candidate a thread, or two: fewer lines of unrolled loops to lower
    values = {"capacity": 256, "threads": threads, "vectors": 2, "bins_log2": 10, "sample_vectors": 1, "blocks_per_sm": 1}
    spec = replace(SLOTS if split else PLAIN, starts=split)
    config = Config.of("tilelang", **values, scheme=request.param, splits=4 if split else 1, whole=split)
    assert not OP.violations(spec, config, H200)
    return spec, config, build.build(render(OP, spec, config), H200)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_tilelang_matches_the_reference(tilelang, order):
    spec, config, built = tilelang
    variant = Variant(OP, spec, config, H200, emulator.kernels(built, order))
    for case in [*OP.cases(spec), Case(SelectSizes(3, 3001), "ragged_normal")]:
        accuracy = verify(variant, case, "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


IN_A_BLOCK = [
    (PLAIN, {"early": False}),
    (SLOTS, {"early": True, "digit_bits": 11}),
    (replace(PLAIN, output="slots", page=8, keep_first=5), {"early": False, "items": 64}),
]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize(("spec", "changes"), IN_A_BLOCK, ids=["tokens", "slots", "halves"])
def test_cuda_matches_the_reference(spec, changes, order, tmp_path):
    """One block's kernel; a cluster's needs a GPU."""
    config = CUDA.replace(**{"threads": 256, "items": 4, **changes})
    variant = Variant(OP, spec, config, H200, emulator.cuda_kernels(render(OP, spec, config), tmp_path, order))
    for case in OP.cases(spec):
        accuracy = verify(variant, OP.within_reach(spec, config, case), "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


STREAMED = CUDA.replace(items=8, digit_bits=11, early=False, stages=2)
LONG = [Case(SelectSizes(2, 9001), kind) for kind in ("ragged_normal", "ragged_special", "relu")]
IN_A_STREAM = [
    (PLAIN, {}, 5, "ascending"),
    (replace(SLOTS, starts=True), {"items": 16}, 5, "shuffled"),
    (replace(SLOTS, scores="fp32", topk=700, keep_first=300, keep_recent=400), {"stages": 3}, -0.6, "descending"),
    (replace(SLOTS, scores="fp32"), {"items": 32, "longest": FAR}, 5, "shuffled"),
    pytest.param(
        PLAIN, {"items": 32, "threads": 256, "blocks_per_sm": 2, "longest": FAR // 2}, 5, "descending", marks=pytest.mark.slow
    ),
]
VERY_LONG = [Case(SelectSizes(1, columns), kind) for columns, kind in ((300001, "ragged_normal"), (FAR, "few"))]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "changes", "margin", "order"), IN_A_STREAM, ids=["tokens", "slots", "wrong-guess", "far", "two-an-sm"]
)
def test_a_row_that_streams_matches_the_reference(spec, changes, margin, order, tmp_path, monkeypatch):
    """Also where the pool overflows (a third of LONG), and where the sample asks for too few, so that rows are read twice."""
    monkeypatch.setattr(streamed, "_MARGIN", margin)
    config = STREAMED.replace(**changes)
    assert not OP.violations(spec, config, H200)
    variant = Variant(OP, spec, config, H200, emulator.cuda_kernels(render(OP, spec, config), tmp_path, order))
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


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_many_keys_of_one_digit_match_the_reference(tmp_path):
    """More than four a thread: of one value, found at once, and of many, counted in turn."""
    config = CUDA.replace(threads=256, items=32, early=False, digit_bits=11)
    kernels = emulator.cuda_kernels(render(OP, PLAIN, config), tmp_path, "shuffled")
    for kind in ("equal", "relu", "narrow", "few", "special", "ragged_equal", "ragged_narrow"):
        accuracy = verify(Variant(OP, PLAIN, config, H200, kernels), Case(SelectSizes(2, 3001), kind), "cpu", repeats=2)
        assert accuracy.passed, (kind, accuracy.detail)


@pytest.mark.parametrize(
    ("rows", "columns", "backend"),
    [
        pytest.param(4096, 2000000, "tilelang", marks=FURTHER),
        (4096, 131072, "cuda"),
        pytest.param(4096, 32768, "cuda", marks=FURTHER),
    ],
)
def test_default_compiles_for_hopper(rows, columns, backend):
    spec = SelectSpec(2048)
    config = OP.default_config(spec, SelectSizes(rows, columns), H200)
    assert config.backend == backend
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize("config", [ROW, SPLIT], ids=["row", "split"])
def test_triton_compiles_for_hopper(config):
    assert_compiles(OP, SLOTS, config)


@pytest.mark.parametrize("topk", [1, 16, 64, 100, 512, 1024, 2048, 3000, 4096])
@pytest.mark.parametrize("scores", ["fp32", "bf16"])
@pytest.mark.parametrize("case", OP.workloads(PLAIN), ids=lambda case: case.sizes.id)
def test_defaults_break_no_constraint(topk, scores, case):
    spec, bucket = SelectSpec(topk, scores=scores), case.sizes.bucket()
    for backend in ("", "cuda"):
        assert OP.violations(spec, OP.default_config(spec, case.sizes, H200, backend), H200, bucket) == []


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


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"threads": 1024, "items": 64}, "scores of a block"),
        ({"threads": 256, "cluster": 16}, "warps for the cluster's bins"),
        ({"persistent": True, "early": False, "cluster": 2}, "blocks that stay for a row"),
        ({"persistent": True}, "scores loaded before their window"),
        ({"threads": 1024, "items": 8, "blocks_per_sm": 3}, "threads per SM"),
        ({"items": 32, "blocks_per_sm": 3}, "registers"),
        ({"threads": 1024, "items": 32, "persistent": True, "early": False, "blocks_per_sm": 2}, "smem per SM"),
        ({"stages": 2}, "scores loaded before their window"),
        ({"stages": 2, "early": False, "persistent": True}, "blocks that stay"),
        ({"stages": 2, "early": False, "threads": 256}, "threads for a sample"),
        ({"stages": 2, "early": False, "items": 64}, "scores of a thread"),
        ({"stages": 2, "early": False, "items": 4}, "bitmap"),
        ({"stages": 6, "early": False, "threads": 1024}, "smem"),
        ({"stages": 4, "early": False, "threads": 512, "blocks_per_sm": 2, "items": 16}, "smem per SM"),
        ({"stages": 2, "early": False, "items": 16, "longest": FAR}, "bitmap"),
        ({"longest": FAR}, "columns of a row that does not stream"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cuda_constraints(changes, name):
    assert not OP.violations(SelectSpec(2048), CUDA, H200)
    assert name in {violation.name for violation in OP.violations(SelectSpec(2048), CUDA.replace(**changes), H200)}


def test_cuda_is_for_hopper():
    for name in ("a100", "b200"):
        assert "capability" in {violation.name for violation in OP.violations(PLAIN, CUDA, resolve(name))}
        assert OP.default_config(PLAIN, SelectSizes(1, 8192), resolve(name)).backend != "cuda"


@pytest.mark.parametrize(
    ("sizes", "broken"),
    [
        (SelectSizes(1, 1), []),
        (SelectSizes(256, 8192), []),
        (SelectSizes(257, 8192), ["rows read whole"]),
        (SelectSizes(1, 8193), ["columns"]),
        (SelectSizes(1, 131073), ["columns"]),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_cuda_reaches_as_far_as_its_registers(sizes, broken):
    found = OP.violations(PLAIN, CUDA, H200, sizes.bucket())
    assert [violation.name for violation in found] == broken


def test_rows_that_stream_may_be_as_long_as_their_bitmap():
    assert not OP.violations(PLAIN, STREAMED, H200, SelectSizes(4096, 131072).bucket())
    found = OP.violations(PLAIN, STREAMED, H200, SelectSizes(1, 131073).bucket())
    assert [violation.name for violation in found] == ["columns"]
    far = STREAMED.replace(items=32, longest=FAR)
    assert not OP.violations(PLAIN, far, H200, SelectSizes(4096, FAR).bucket())
    found = OP.violations(PLAIN, far, H200, SelectSizes(1, FAR + 1).bucket())
    assert [violation.name for violation in found] == ["columns"]


def test_a_record_from_before_rows_streamed_is_read():
    older = {name: value for name, value in CUDA.to_dict().items() if name not in ("stages", "longest")}
    assert OP.config("cuda", older) == CUDA


def test_rows_longer_than_any_cluster_holds_are_sampled():
    for rows, columns in ((1, 131073), (64, FAR + 1), (4096, FAR + 1)):
        assert OP.default_config(PLAIN, SelectSizes(rows, columns), H200).backend == "tilelang"
    for rows, cluster in ((2, 8), (16, 4), (17, 2), (4096, 1)):
        config = OP.default_config(PLAIN, SelectSizes(rows, 131073), H200)
        assert (config["longest"], config["cluster"]) == (FAR, cluster)
    with pytest.raises(NoConfig, match=r"select \(cuda\) fits NVIDIA H200"):
        OP.default_config(PLAIN, SelectSizes(1, FAR + 1), H200, "cuda")


def test_cases_are_cut_to_what_a_config_reaches():
    spec = SelectSpec(2048)
    longest = {case.sizes.columns for case in OP.cases_for(spec, CUDA)}
    every = [*OP.cases(spec), *OP.long_cases(spec)]
    assert max(longest) == 8192 < max(case.sizes.columns for case in every)
    assert {case.distribution for case in OP.cases_for(spec, CUDA)} == {case.distribution for case in every}
    assert OP.cases_for(spec, ROW) == every
    wide = CUDA.replace(cluster=16, threads=1024, items=8)
    assert max(case.sizes.columns for case in OP.cases_for(spec, wide)) == 131072  # a part for each of its blocks


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


def test_verification_covers_blocks_and_clusters_under_every_option():
    model = presets.preset("deepseek-v3.2")
    found = [each for each in verification.subjects(model, H200, ["select"]) if each.config.backend == "cuda"]
    for spec in {option for own in OP.specs(model) for option in OP.options(own)}:
        clusters = {each.config["cluster"] > 1 for each in found if each.spec == spec}
        assert clusters == {False, True}, spec
    assert any(each.config["persistent"] for each in found)


@pytest.mark.parametrize("topk", [1, 2, 16])
def test_the_options_of_a_few_blocks_are_possible(topk):
    assert {option.topk for option in OP.options(SelectSpec(topk))} == {topk}


def select(scores, topk=64, **options):
    """The reference, called as a user would, with windows that reach the row's end."""
    ends = torch.full((len(scores),), scores.shape[1], dtype=torch.int32)
    values = {"starts": None, "page_table": None, "page": 64, "keep_first": 0, "keep_recent": 0, **options}
    spec, _, inputs = OP.bind(scores, ends, topk, *values.values())
    return OP.reference(spec, inputs)["chosen"]


def test_ties_go_to_the_lowest_token():
    scores = torch.zeros(1, 200)
    scores[0, 150] = 1.0
    assert select(scores).tolist() == [[*range(63), 150]]


def test_zeros_of_both_signs_are_equal_and_nan_comes_last():
    scores = torch.full((1, 100), torch.nan)
    scores[0, 30:60] = -0.0
    scores[0, 60:80] = 0.0
    scores[0, 80:90] = -torch.inf
    assert select(scores).tolist() == [[*range(4), *range(30, 90)]]


def test_both_ends_of_the_window_are_kept():
    scores = torch.arange(200.0).roll(100)[None]
    assert select(scores, keep_first=2, keep_recent=3).tolist() == [[0, 1, *range(41, 100), 197, 198, 199]]


def test_slots_go_through_the_page_table_and_absent_pages_give_none():
    scores = -torch.arange(96.0).expand(2, 96)
    table = torch.tensor([[5, -1, 2]], dtype=torch.int32)
    row = [*range(160, 192), *[-1] * 32]
    assert select(scores.contiguous(), page_table=table, page=32).tolist() == [row, row]


def test_is_registered_by_its_stem():
    assert ops.get("select") is OP


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("topk", 0),
        ("topk", 4097),
        ("scores", "fp16"),
        ("output", "pages"),
        ("page", 0),
        ("keep_first", 65),
        ("keep_recent", -1),
    ],
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        SelectSpec.from_dict({"topk": 64, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    spec = replace(PLAIN, output="slots")
    inputs = dict(OP.inputs(spec, Case(SelectSizes(4, 300), "ragged_normal"), Draw(0)))
    order = ("scores", "ends", "topk", "starts", "page_table", "page", "keep_first", "keep_recent")
    values = {**inputs, "topk": 64, "page": 64, "keep_first": 0, "keep_recent": 0, **changes}
    return [values[name] for name in order]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("scores", torch.zeros(4, 300, dtype=torch.float64)),
        ("scores", torch.zeros(300, 4).T),
        ("scores", torch.zeros(1200)),
        ("scores", torch.empty(4, (1 << 30) + 1, device="meta")),
        ("ends", torch.zeros(3, dtype=torch.int32)),
        ("starts", torch.zeros(4, dtype=torch.int64)),
        ("page_table", torch.zeros(3, 5, dtype=torch.int32)),
        ("page_table", torch.zeros(2, 5)),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*arguments(**{argument: value}))


def test_bind_names_what_it_took():
    spec, sizes, inputs = OP.bind(*arguments())
    assert (spec, sizes) == (replace(PLAIN, output="slots"), SelectSizes(4, 300))
    assert list(inputs) == ["scores", "ends", "starts", "page_table"]
