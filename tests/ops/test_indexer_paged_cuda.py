"""The paged indexer in CUDA C++, of up to six queries: on a CPU against the reference, what it refuses, compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.indexer_paged import OP, IndexerPagedSizes, IndexerPagedSpec, launching
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify

import emulator
from support import H200, assert_compiles

CONFIG = Config.of("cuda", groups=2, accumulators=2, producers=2, num_stages=6, gathered=0, halved=1, segments=2)
RELUS = CONFIG.replace(halved=0, segments=3)  # queries as they come
SPEC = IndexerPagedSpec(64, 128, next_n=4)
PAIRS = [
    (SPEC, CONFIG, "shuffled"),
    (replace(SPEC, clean=True, page=128), CONFIG.replace(accumulators=1, producers=1, gathered=16), "ascending"),
    (replace(SPEC, next_n=3, page=256, logits="bf16"), CONFIG.replace(gathered=16), "descending"),
    (replace(SPEC, next_n=3, clean=True), CONFIG.replace(producers=1, num_stages=4), "shuffled"),
    (replace(SPEC, next_n=5), CONFIG.replace(groups=3, accumulators=1, gathered=16), "ascending"),
    (replace(SPEC, next_n=6, logits="bf16", clean=True), CONFIG.replace(groups=3, accumulators=1), "shuffled"),
    (replace(SPEC, next_n=1), CONFIG.replace(groups=4, accumulators=1, num_stages=4, gathered=16), "descending"),
    (replace(SPEC, next_n=2), CONFIG.replace(groups=3, accumulators=1, producers=3), "shuffled"),
    (replace(SPEC, heads=32, next_n=2, clean=True), CONFIG.replace(accumulators=1, gathered=16), "ascending"),
    (replace(SPEC, heads=16, logits="bf16"), CONFIG.replace(groups=4, accumulators=1), "descending"),
    (replace(SPEC, next_n=2), RELUS.replace(groups=3, accumulators=1, segments=4), "shuffled"),
    (replace(SPEC, next_n=1, clean=True), RELUS.replace(groups=2, accumulators=1, gathered=16), "ascending"),
    (replace(SPEC, next_n=3, page=128), RELUS.replace(segments=2), "descending"),
    (replace(SPEC, heads=32, next_n=4, logits="bf16", clean=True), RELUS.replace(num_stages=4), "shuffled"),
    (replace(SPEC, heads=16, next_n=5), RELUS.replace(groups=3, accumulators=1, producers=1), "ascending"),
]
EMULATED = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
NAMES = [f"{spec.id}-{config['halved']}" for spec, config, _ in PAIRS]
BY_SPEC = pytest.mark.parametrize(("spec", "config", "order"), PAIRS, ids=NAMES)


def emulated(spec, config, order, folder, sms=3):
    """Few SMs: programs take parts of several rows."""
    kernels = emulator.cuda_kernels(render(OP, spec, config), folder, order)
    return Variant(OP, spec, config, replace(H200, sms=sms), kernels)


@EMULATED
@BY_SPEC
def test_matches_the_reference(spec, config, order, tmp_path):
    variant = emulated(spec, config, order, tmp_path)
    for case in (*OP.cases(spec), Case(IndexerPagedSizes(5, 1400), "ragged")):
        accuracy = verify(variant, case, "cpu", repeats=2)
        assert accuracy.passed, (case.id, accuracy.detail)


@EMULATED
@pytest.mark.parametrize("sms", [1, 2, 5, 9])
@pytest.mark.parametrize("changes", [{}, {"gathered": 16}, {"halved": 0}, {"halved": 0, "accumulators": 1, "segments": 3}])
def test_rows_are_shared_out_among_any_programs(changes, sms, tmp_path):
    """Tiles of 3 rows, of which one is long and one empty: more programs than rows, fewer, and some without work."""
    config = CONFIG.replace(**changes)
    inputs = OP.inputs(SPEC, Case(IndexerPagedSizes(3, 2100), "full"), Draw(0))
    inputs["lengths"].copy_(torch.tensor([[70, 30, 0, 64], [0, 0, 0, 0], [2100, 2099, 2098, 1]]))
    variant = emulated(SPEC, config, "shuffled", tmp_path, sms)
    outputs = OP.allocate(SPEC, inputs)
    outputs["logits"].fill_(12345.0)
    accuracy = OP.check(SPEC, inputs, variant.run(inputs, outputs), OP.reference(SPEC, inputs))
    assert accuracy.passed, accuracy.detail
    beyond = torch.arange(2100) >= inputs["lengths"].flatten()[:, None]
    assert (outputs["logits"][beyond] == 12345.0).all()


@EMULATED
@pytest.mark.parametrize("halved", [1, 0])
def test_nan_shows_where_the_reference_has_it(halved, tmp_path):
    """Of a query, a weight, a key, a scale; weights of any size are weighed, of infinite sums there is none."""
    spec = replace(SPEC, next_n=3)
    inputs = OP.inputs(spec, Case(IndexerPagedSizes(4, 200), "full"), Draw(1))
    q, cache = inputs["q"].view(torch.uint8), inputs["cache"].view(-1, spec.page * 132)
    q[1, 0, 5, 7] = 0x7F
    q[2, 2, 50, 127] = 0xFF
    inputs["weights"][4, 4] = torch.nan
    inputs["weights"][5] = 0
    inputs["weights"][6] *= 1e30
    inputs["weights"][7] *= 1e-25
    cache[3, 77] = 0x7F
    cache[5, 64 * 128 + 40 : 64 * 128 + 44] = torch.tensor([torch.nan]).view(torch.uint8)
    outputs = emulated(spec, CONFIG.replace(halved=halved), "shuffled", tmp_path).run(inputs, OP.allocate(spec, inputs))
    logits, reference = outputs["logits"], OP.reference(spec, inputs)["logits"]
    assert reference.isnan().any(1).sum() >= 5
    assert torch.equal(logits.isnan(), reference.isnan())
    size = reference.nan_to_num().abs().amax(1, keepdim=True)
    assert torch.all((logits - reference).nan_to_num().abs() <= 4e-6 * size)


@EMULATED
@pytest.mark.parametrize(
    ("next_n", "changes"),
    [
        (4, {}),
        (4, {"accumulators": 1, "gathered": 16}),
        (1, {"accumulators": 1, "groups": 3}),
        (4, {"halved": 0}),
        (2, {"halved": 0, "segments": 4, "accumulators": 1, "groups": 1}),
        (1, {"halved": 0, "segments": 3, "accumulators": 1, "groups": 4, "num_stages": 8, "gathered": 16}),
    ],
)
def test_a_program_takes_many_short_rows(next_n, changes, tmp_path):
    """Segments of a tile, of more rows than are counted at once; groups that take tiles in turn pass some without one."""
    variant = emulated(replace(SPEC, next_n=next_n), CONFIG.replace(**changes), "shuffled", tmp_path)
    accuracy = verify(variant, Case(IndexerPagedSizes(140, 60), "ragged"), "cpu")
    assert accuracy.passed, accuracy.detail


@pytest.mark.parametrize(
    ("spec", "changes", "name"),
    [
        (replace(SPEC, scores="bf16"), {}, "scores"),
        (replace(SPEC, score="relu_bias"), {}, "score"),
        (replace(SPEC, heads=24), {}, "heads"),
        (replace(SPEC, head_dim=64), {}, "head_dim"),
        (replace(SPEC, page=32), {}, "page"),
        (replace(SPEC, next_n=8), {}, "next_n"),
        (replace(SPEC, next_n=2), {"groups": 1}, "accumulators"),
        (replace(SPEC, next_n=2), {"groups": 4, "accumulators": 1}, "registers"),
        (replace(SPEC, next_n=1), {"groups": 3, "accumulators": 1, "num_stages": 8}, "stages"),
        (replace(SPEC, next_n=6), {}, "groups"),
        (replace(SPEC, next_n=6), {"groups": 3}, "registers"),
        (SPEC, {"producers": 3, "num_stages": 8}, "stages"),
        (SPEC, {"producers": 3, "gathered": 16}, "producers"),
        (SPEC, {"num_stages": 12, "gathered": 64}, "smem"),
        (SPEC, {"segments": 3}, "segments"),
        (SPEC, {"halved": 0, "segments": 4, "num_stages": 12}, "smem"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_template_says_what_it_cannot_do(spec, changes, name):
    assert name in {violation.name for violation in OP.violations(spec, CONFIG.replace(**changes), H200)}


def test_template_is_for_hopper_alone():
    (violation,) = OP.violations(SPEC, CONFIG, resolve("b200"))
    assert violation.name == "wgmma"


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (SPEC, {"num_stages": 8}),
        (replace(SPEC, next_n=3, clean=True, logits="bf16"), {"gathered": 32}),
        (replace(SPEC, next_n=6), {"groups": 3, "accumulators": 1, "producers": 1, "num_stages": 8}),
        (replace(SPEC, next_n=2), {"groups": 3, "accumulators": 1, "num_stages": 12}),
        (replace(SPEC, next_n=2), {"halved": 0, "segments": 3, "groups": 3, "accumulators": 1, "num_stages": 18}),
        (replace(SPEC, next_n=1), {"halved": 0, "segments": 4, "groups": 3, "accumulators": 1, "num_stages": 18}),
    ],
    ids=["four", "three", "six", "two", "relus of two", "relus of one"],
)
def test_compiles_without_spills(spec, changes):
    assert_compiles(OP, spec, CONFIG.replace(**changes))


@pytest.mark.parametrize(
    ("batch", "context", "programs"),
    [
        (64, 32768, (64, 2)),  # four SMs are left out
        (256, 8192, (128, 1)),  # two rows each, as many SMs
        (200, 8192, (132, 1)),  # 100 SMs would be too few
        (132, 8192, (132, 1)),
        (40, 8192, (40, 3)),
        (48, 8192, (44, 3)),  # four rows are dealt out among all
        (100, 8192, (66, 2)),
        (3, 64, (3, 1)),
    ],
)
def test_programs_take_whole_rows_where_few_sms_are_left_out(batch, context, programs):
    assert launching.whole_rows(batch, context // 64, 132) == programs


def test_default_for_several_queries_over_many_tokens():
    """Two to six queries of many sequences; one was slower."""
    many, few, crowd = IndexerPagedSizes(64, 65536), IndexerPagedSizes(8, 65536), IndexerPagedSizes(256, 8192)
    backends = [OP.default_config(replace(SPEC, next_n=n), many, H200).backend for n in (1, 2, 3, 4, 5, 6, 8)]
    assert backends == ["gluon", "cuda", "cuda", "cuda", "cuda", "cuda", "gluon"]
    assert OP.default_config(SPEC, few, H200).backend == "gluon"
    assert OP.default_config(SPEC, crowd, H200).backend == "cuda"
    assert OP.default_config(SPEC, IndexerPagedSizes(128, 8192), H200).backend == "gluon"
    assert OP.default_config(replace(SPEC, heads=32), many, H200).backend == "gluon"
    assert OP.default_config(replace(SPEC, batch_invariant=True), many, H200).backend == "gluon"
    assert OP.default_config(SPEC, many, resolve("b200")).backend == "triton"


def test_default_for_many_short_contexts():
    """Queries as they come, of as many as the template serves, and of fewer heads too."""
    short = IndexerPagedSizes(512, 1024)
    found = [OP.default_config(replace(SPEC, next_n=n), short, H200) for n in (1, 2, 3, 4, 5, 6)]
    assert [(config.backend, config["halved"]) for config in found] == [("cuda", 0)] * 6
    assert OP.default_config(replace(SPEC, heads=32), short, H200)["halved"] == 0
    for spec in (replace(SPEC, next_n=8), replace(SPEC, score="relu_bias"), replace(SPEC, batch_invariant=True)):
        assert OP.default_config(spec, short, H200).backend == "gluon"
    few = [OP.default_config(replace(SPEC, next_n=n), IndexerPagedSizes(128, 1024), H200).backend for n in (1, 2, 3, 4)]
    assert few == ["gluon", "gluon", "cuda", "cuda"]
    assert OP.default_config(SPEC, short, resolve("b200")).backend == "triton"
    middling = [OP.default_config(replace(SPEC, next_n=n), IndexerPagedSizes(300, 7168), H200) for n in (1, 2, 3, 4)]
    assert [config["halved"] for config in middling] == [0, 0, 1, 1]
    assert OP.default_config(replace(SPEC, next_n=2), IndexerPagedSizes(300, 7169), H200)["halved"] == 1


@pytest.mark.parametrize(
    ("batch", "context", "next_n", "programs"),
    [
        (600, 512, 2, (120, 1)),  # five rows each
        (600, 512, 4, (132, 1)),  # products set the pace: all SMs
        (600, 2048, 1, (132, 1)),
        (1000, 256, 4, (125, 1)),
        (130, 4096, 2, (130, 1)),
    ],
)
def test_programs_of_short_rows(batch, context, next_n, programs):
    spec = replace(SPEC, next_n=next_n)
    inputs = OP.inputs(spec, Case(IndexerPagedSizes(batch, context), "full"), Draw(0, "meta"))
    config = OP.default_config(spec, IndexerPagedSizes(batch, context), H200)
    (launch,) = OP.launches(spec, config, inputs, OP.allocate(spec, inputs), H200)
    assert launch.grid == (*programs, 1)
