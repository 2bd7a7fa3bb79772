"""NaN in an indexer's keys: a broken key stays visible in its own scores, loses to every number, touches no other."""

from __future__ import annotations

import math

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.kernels.render import render
from dsa_codegen.ops.indexer import IndexerSpec
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from broken_rows import DEVICES, FP8, under
from support import run_interpreted

SCORES = ["weighted_relu", "relu_bias"]
INDEXERS = {
    "gluon": Config.of("gluon", accumulators=1, block_n=64, num_stages=2, blocks_per_sm=2, edges=False, unrolled=False),
    "triton": Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=1),
    "tilelang": Config.of(
        "tilelang", block_q=2, block_n=64, num_stages=2, splits=1, pipeline="plain", threads=128, blocks_per_sm=1
    ),
}
PAGED_INDEXERS = {
    "gluon": Config.of("gluon", part_queries=1, block_n=64, num_stages=2, accumulators=1, blocks_per_sm=2, gathered=1),
    "triton": Config.of("triton", schedule="split", block_n=64, block_q=1, num_warps=4, num_stages=2, blocks_per_sm=1),
}


def indexer_inputs(device="cpu"):
    draw = Draw(5, device)
    k, k_scale = draw.normal(200, 64, dtype=FP8), draw.uniform(200, low=0.5)
    k[7, 3] = math.nan
    k_scale[11] = math.nan
    q, weights = draw.normal(3, 8, 64, dtype=FP8), draw.normal(3, 8)
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    return {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": starts + 200}


def assert_nan_at(logits, columns):
    where = logits.isnan().nonzero()[:, 1].unique().tolist()
    assert where == columns
    assert logits.isnan().sum() == len(logits) * len(columns)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", INDEXERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_scores_nan(device, backend, score):
    with under(device, "indexer", INDEXERS[backend]):
        assert_nan_at(dsa.indexer_logits(*indexer_inputs(device).values(), score=score), [7, 11])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_that_nobody_quantised_scores_nan(device, score):
    inputs = indexer_inputs(device)
    q, k = (inputs[name].float().bfloat16() for name in ("q", "k"))
    rest = list(inputs.values())[3:]
    assert_nan_at(dsa.indexer_logits(q, k, None, *rest, score=score, scores="bf16"), [7])


@pytest.mark.parametrize("score", SCORES)
def test_a_broken_key_scores_nan_interpreted(interpreter, score):
    spec = IndexerSpec(8, 64, score=score)
    outputs = run_interpreted(interpreter, "indexer", spec, INDEXERS["triton"], indexer_inputs())
    assert_nan_at(outputs["logits"], [7, 11])


def paged_indexer_inputs(score, device="cpu"):
    op = ops.get("indexer_paged")
    spec = IndexerPagedSpec(8, 64, score=score)
    inputs = op.inputs(spec, Case(IndexerPagedSizes(1, 150), "full"), Draw(6, device))
    slot = int(inputs["page_table"][0, 0]) * 64
    layout, slots = IndexKLayout(64, 64), torch.tensor([slot + 7, slot + 11], device=device)
    keys, scales = layout.unpack(inputs["cache"], slots)
    keys[0, 3], scales[1] = math.nan, math.nan
    layout.pack(inputs["cache"], slots, keys, scales)
    return spec, inputs


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", PAGED_INDEXERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_key_of_a_cache_scores_nan(device, backend, score):
    _, inputs = paged_indexer_inputs(score, device)
    with under(device, "indexer_paged", PAGED_INDEXERS[backend]):
        assert_nan_at(dsa.indexer_logits_paged(*inputs.values(), score=score), [7, 11])


@pytest.mark.parametrize("score", SCORES)
def test_a_broken_key_of_a_cache_scores_nan_interpreted(interpreter, score):
    spec, inputs = paged_indexer_inputs(score)
    outputs = run_interpreted(interpreter, "indexer_paged", spec, PAGED_INDEXERS["triton"], inputs)
    assert_nan_at(outputs["logits"], [7, 11])


@pytest.mark.parametrize("op", ["indexer", "indexer_paged"])
@pytest.mark.parametrize("score", SCORES)
def test_every_relu_of_an_indexer_keeps_nan(op, score):
    spec = IndexerSpec(8, 64, score=score) if op == "indexer" else IndexerPagedSpec(8, 64, score=score)
    for config in (INDEXERS if op == "indexer" else PAGED_INDEXERS).values():
        code = render(ops.get(op), spec, config).code
        assert code.count("PropagateNan.ALL") + code.count("max.NaN.f32") == 1
        assert "T.max(terms" not in code


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_token_is_chosen_last(device):
    scores = torch.arange(100.0, device=device).expand(2, 100).contiguous()
    scores[:, 50:90] = math.nan
    chosen = dsa.select(scores, torch.full((2,), 100, dtype=torch.int32, device=device), 64)
    assert chosen[0].tolist() == [*range(50), 50, 51, 52, 53, *range(90, 100)]
