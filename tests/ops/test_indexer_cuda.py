"""The prefill indexer in CUDA C++, emulated against the reference; half of each ReLU by a product is as exact as ReLU."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen.gpu import detect, resolve
from dsa_codegen.kernels.build import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.problem import compare
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

import emulator
from support import FURTHER, H200, assert_compiles

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
HALVES = Config.of("cuda", relu="halves", block_n=64, num_stages=4, groups=1, blocks_per_sm=3)
SHARED = HALVES.replace(num_stages=8, groups=3, blocks_per_sm=1)  # keys shared by three groups
PLAIN = HALVES.replace(relu="max", num_stages=3)
CASES = [
    (IndexerSpec(64, 128), HALVES),
    (IndexerSpec(64, 128, clean=True, logits="bf16"), SHARED),
    (IndexerSpec(64, 128, compressed=True, clean=True), HALVES),
    (IndexerSpec(32, 128, clean=True), HALVES.replace(block_n=128, num_stages=2)),
    (IndexerSpec(32, 128, compressed=True), SHARED),
    (IndexerSpec(16, 128, clean=True), SHARED.replace(relu="max")),
    (IndexerSpec(8, 128), PLAIN),
    (IndexerSpec(8, 128, clean=True), PLAIN.replace(block_n=128, num_stages=2)),
]


def variant(spec, config, folder):
    return Variant(OP, spec, config, H200, emulator.cuda_kernels(render(OP, spec, config), folder, "shuffled"))


def scores_of(variant, inputs):
    outputs = OP.allocate(variant.spec, inputs)
    outputs["logits"].fill_(math.nan)
    return variant.run(inputs, outputs)


@pytest.mark.parametrize(("spec", "config"), CASES, ids=str)
def test_matches_the_reference(tmp_path, spec, config):
    assert not OP.violations(spec, config, H200)
    made = variant(spec, config, tmp_path)
    for case in OP.cases(spec):
        inputs = OP.inputs(spec, case, Draw(2))
        accuracy = OP.check(spec, inputs, scores_of(made, inputs), OP.reference(spec, inputs))
        assert accuracy.passed, f"{case.id}: {accuracy.detail}"


def few(spec, seed=4):
    """Inputs of a few rows, all of them whole."""
    inputs = OP.inputs(spec, Case(IndexerSizes(9, 150), "causal"), Draw(seed))
    return {**inputs, "ends": torch.full_like(inputs["ends"], 150)}


@pytest.mark.parametrize("heads", [32, 64])
def test_pieces_are_as_exact_as_a_maximum(tmp_path, heads):
    """Weights of one sign and of all magnitudes, too, where most of what |x| adds up to must be taken away again."""
    spec = IndexerSpec(heads, 128)
    made = {relu: variant(spec, HALVES.replace(relu=relu), tmp_path) for relu in ("max", "halves")}
    for scale in (1.0, 1e-24, 1e24):
        for change in (torch.abs, lambda weights: weights * 10.0 ** (-torch.arange(heads) / 4)):
            inputs = few(spec)
            inputs["weights"] = change(inputs["weights"]) * scale
            wanted = OP.reference(spec, {**inputs, "q": inputs["q"].double(), "k": inputs["k"].double()})["logits"] / scale
            gaps = {
                relu: compare.similarity_gap(scores_of(each, inputs)["logits"].double() / scale, wanted)
                for relu, each in made.items()
            }
            assert gaps["halves"] < 1e-11 and gaps["max"] < 1e-11, (scale, gaps)


@pytest.mark.parametrize("config", [HALVES, SHARED, PLAIN], ids=str)
def test_what_is_no_number_shows_where_it_does_in_the_reference(tmp_path, config):
    spec = IndexerSpec(64, 128)
    inputs = few(spec)
    inputs["k"].view(torch.uint8)[37, 5] = inputs["q"].view(torch.uint8)[4, 1, 100] = 0x7F
    inputs["k_scale"][91] = inputs["weights"][2, 3] = math.nan
    logits, wanted = scores_of(variant(spec, config, tmp_path), inputs)["logits"], OP.reference(spec, inputs)["logits"]
    assert torch.equal(logits.isnan(), wanted.isnan())
    assert 0 < wanted.isnan().sum() < wanted.numel() / 2


def test_an_infinite_weight_leaves_no_number(tmp_path):
    """Where ReLU gives infinity or NaN, by the product's sign; its neighbours are what they would be."""
    spec = IndexerSpec(64, 128)
    inputs = few(spec)
    whole = scores_of(made := variant(spec, HALVES, tmp_path), inputs)["logits"]
    inputs["weights"][2, 3] = math.inf
    logits = scores_of(made, inputs)["logits"]
    assert not logits[2].isfinite().any()
    assert compare.same_bits(logits[[0, 1, *range(3, 9)]], whole[[0, 1, *range(3, 9)]])


def test_a_rows_bits_do_not_depend_on_the_config(tmp_path):
    spec = IndexerSpec(64, 128, batch_invariant=True)
    inputs = few(spec)
    configs = [HALVES, SHARED, HALVES.replace(block_n=128, num_stages=2)]
    assert {OP.order(spec, config) for config in configs} == {"cuda-halves"}
    rows = [scores_of(variant(spec, config, tmp_path), inputs)["logits"] for config in configs]
    some = {**inputs, **{name: inputs[name][3:6] for name in ("q", "weights", "starts", "ends")}}
    rows.append(scores_of(variant(spec, HALVES, tmp_path), some)["logits"])
    assert all(compare.same_bits(each, rows[0]) for each in rows[1:3])
    assert compare.same_bits(rows[3], rows[0][3:6])


@pytest.mark.parametrize(
    ("name", "spec", "changes", "gpu"),
    [
        ("wgmma", IndexerSpec(64, 128), {}, "b200"),
        ("shape", IndexerSpec(64, 64), {}, "h200"),
        ("shape", IndexerSpec(64, 128, score="relu_bias"), {}, "h200"),
        ("scores", IndexerSpec(64, 128, scores="bf16"), {}, "h200"),
        ("heads", IndexerSpec(24, 128), {}, "h200"),
        ("registers", IndexerSpec(8, 128), {}, "h200"),
        ("smem", IndexerSpec(64, 128), {"num_stages": 8}, "h200"),
        ("groups", IndexerSpec(64, 128), {"groups": 3}, "h200"),
    ],
)
def test_refuses(name, spec, changes, gpu):
    found = OP.violations(spec, HALVES.replace(**changes), resolve(gpu))
    assert name in {violation.name for violation in found}


@pytest.mark.parametrize(
    ("spec", "config"),
    [CASES[0], *(pytest.param(*case, marks=FURTHER) for case in CASES[1:])],
    ids=str,
)
def test_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "config"), CASES, ids=str)
def test_matches_the_reference_on_a_gpu(spec, config):
    gpu = detect()
    if OP.violations(spec, config, gpu):
        pytest.skip(f"not for {gpu.name}")
    made = Variant(OP, spec, config, gpu, build(render(OP, spec, config), gpu).load())
    for case in [*OP.cases(spec), *OP.long_cases(spec)]:
        inputs = OP.inputs(spec, case, Draw(2, "cuda"))
        accuracy = OP.check(spec, inputs, scores_of(made, inputs), OP.reference(spec, inputs))
        assert accuracy.passed, f"{case.id}: {accuracy.detail}"


@pytest.mark.gpu
def test_pieces_err_no_more_than_a_maximum_on_a_gpu():
    """Whose sums of FP8 products keep 13 bits."""
    spec, gpu = IndexerSpec(64, 128), detect()
    if OP.violations(spec, HALVES, gpu):
        pytest.skip(f"not for {gpu.name}")
    inputs = OP.inputs(spec, Case(IndexerSizes(256, 3000), "causal"), Draw(5, "cuda"))
    wanted, gaps = OP.reference(spec, inputs), {}
    for relu in ("max", "halves"):
        config = HALVES.replace(relu=relu)
        made = Variant(OP, spec, config, gpu, build(render(OP, spec, config), gpu).load())
        gaps[relu] = OP.check(spec, inputs, scores_of(made, inputs), wanted).similarity
    assert gaps["halves"] < 3 * gaps["max"] < 1e-6
