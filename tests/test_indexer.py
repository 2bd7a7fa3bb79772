"""The prefill indexer: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.draw import Draw
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.op import Case, Config
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.tune.model import plan

from support import H200, assert_compiles, assert_matches_reference

SPECS = [
    IndexerSpec(8, 64),
    IndexerSpec(64, 128, clean=True),
    IndexerSpec(16, 32, score="relu_bias", clean=True),
    IndexerSpec(32, 128, logits="bf16"),
]
SMALL = Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=2)
TILELANG = Config.of("tilelang", block_q=2, block_n=64, num_stages=3, splits=1, pipeline="plain", threads=128, blocks_per_sm=4)
PAIRED = TILELANG.replace(pipeline="paired", num_stages=4, blocks_per_sm=2)
GLUON = Config.of("gluon", accumulators=1, block_n=64, num_stages=4, blocks_per_sm=3)
IN_TURN = GLUON.replace(accumulators=2, blocks_per_sm=2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_compiles_for_hopper(spec):
    assert_compiles(OP, spec, SMALL)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (SPECS[0], TILELANG),
        (SPECS[1], PAIRED),
        (SPECS[2], TILELANG.replace(block_q=4, threads=256)),
        (SPECS[3], TILELANG.replace(block_n=128, threads=256, blocks_per_sm=2)),
    ],
    ids=["plain", "paired-clean", "queries-shared-out", "tokens-shared-out-bf16"],
)
def test_tilelang_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


def test_tilelang_is_for_hopper_only():
    for name in ("l40s", "b200"):
        assert "wgmma" in {violation.name for violation in OP.violations(SPECS[3], TILELANG, resolve(name))}


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (IndexerSpec(64, 128), GLUON),
        (SPECS[1], IN_TURN),
        (SPECS[2], GLUON.replace(num_stages=5)),
        (IndexerSpec(16, 128, score="relu_bias", logits="bf16"), GLUON),
        (SPECS[3], GLUON.replace(num_stages=5)),
        (IndexerSpec(32, 128), IN_TURN.replace(block_n=128, num_stages=3)),
        (SPECS[0], IN_TURN),
        (IndexerSpec(8, 128, score="relu_bias", logits="bf16", clean=True), IN_TURN),
    ],
    ids=["64", "64-in-turn-clean", "16-bias-clean", "16-bias-bf16", "32-bf16", "32-wide-stages", "8", "8-bias-bf16-clean"],
)
def test_gluon_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize(
    ("name", "heads", "changes", "gpu"),
    [
        ("wgmma", 64, {}, "b200"),
        ("registers", 8, {}, "h200"),
        ("registers", 64, {"accumulators": 2}, "h200"),
        ("smem", 64, {"num_stages": 6}, "h200"),
        ("tiles of a stage", 64, {"block_n": 128, "accumulators": 2, "blocks_per_sm": 2}, "h200"),
    ],
)
def test_gluon_refuses(name, heads, changes, gpu):
    found = OP.violations(IndexerSpec(heads, 128), GLUON.replace(**changes), resolve(gpu))
    assert name in {violation.name for violation in found}


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_gluon_fills_the_gpu_with_few_queries(heads):
    spec, sizes = IndexerSpec(heads, 128), IndexerSizes(512, 8192)
    config = OP.default_config(spec, sizes, H200)
    (launch,) = plan(OP, spec, config, Case(sizes, "causal"), H200)
    assert config.backend == "gluon"
    assert launch.grid[0] >= 0.9 * config["blocks_per_sm"] * H200.sms


def test_nothing_is_launched_for_nothing():
    for sizes in (IndexerSizes(0, 40), IndexerSizes(3, 0)):
        assert not plan(OP, SPECS[0], IN_TURN, Case(sizes, "ragged"), H200)


def test_is_registered_by_its_stem():
    assert ops.get("indexer") is OP


@pytest.mark.parametrize(
    ("field", "value"), [("heads", 7), ("head_dim", 100), ("score", "softmax"), ("logits", "fp64"), ("clean", 1)]
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        IndexerSpec.from_dict({"heads": 64, "head_dim": 128, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    inputs = OP.inputs(SPECS[0], Case(IndexerSizes(3, 20), "ragged"), Draw(0))
    options = {"score": "weighted_relu", "logits": "fp32", "clean": False}
    return list({**inputs, **options, **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 8, 64)),
        ("k", torch.zeros(20, 32).to(torch.float8_e4m3fn)),
        ("k_scale", torch.zeros(19)),
        ("weights", torch.zeros(3, 8, dtype=torch.float64)),
        ("starts", torch.zeros(3, dtype=torch.int64)),
        ("ends", torch.zeros(4, dtype=torch.int32)),
        ("score", "softmax"),
        ("logits", "fp64"),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*arguments(**{argument: value}))


def test_bind_names_what_it_took():
    spec, sizes, inputs = OP.bind(*arguments())
    assert (spec, sizes) == (SPECS[0], IndexerSizes(3, 20))
    assert list(inputs) == ["q", "k", "k_scale", "weights", "starts", "ends"]
