"""Token selection: Triton's and TileLang's kernels against a stable sort, what a call means and refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.kernels import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.select import OP, SelectSizes, SelectSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify

import emulator
from select_configs import PLAIN, ROW, SLOTS, SPLIT
from support import FURTHER, H200, assert_compiles, assert_matches_reference


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
