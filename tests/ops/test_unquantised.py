"""Scores of queries and keys that nobody quantised: kernels against the reference, dtypes of the CPU, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.attention import AttentionSizes, AttentionSpec
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.checks import FP8
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

import exact_inputs
from support import H200, assert_compiles, assert_matches_reference

PREFILL, DECODE = ops.get("indexer"), ops.get("indexer_paged")
TILES = Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=2)
PAGES = Config.of("triton", schedule="split", block_n=64, block_q=1, num_warps=4, num_stages=3, blocks_per_sm=1)
PAIRS = [
    (PREFILL, IndexerSpec(8, 64, scores="bf16"), TILES),
    (PREFILL, IndexerSpec(16, 32, score="relu_bias", clean=True, compressed=True, scores="bf16"), TILES),
    (DECODE, IndexerPagedSpec(16, 32, page=32, scores="bf16"), PAGES.replace(schedule="persistent")),
    (
        DECODE,
        IndexerPagedSpec(8, 64, next_n=3, page=128, score="relu_bias", clean=True, scores="bf16"),
        PAGES.replace(block_q=2),
    ),
]
BY_SPEC = pytest.mark.parametrize(("op", "spec", "config"), PAIRS, ids=[f"{op.name}-{spec.id}" for op, spec, _ in PAIRS])


@BY_SPEC
@pytest.mark.parametrize("number", [2, 3])
def test_matches_the_reference(interpreter, op, spec, config, number):
    assert_matches_reference(interpreter, op, spec, config, op.cases(spec)[number])


@pytest.mark.parametrize("gpu", ["h200", pytest.param("b200", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("op", "spec"), [(PREFILL, IndexerSpec(64, 128)), (DECODE, IndexerPagedSpec(64, 128, next_n=2))])
def test_the_default_compiles(op, spec, gpu):
    spec = spec.from_dict({**spec.to_dict(), "scores": "bf16"})
    target = resolve(gpu)
    config = op.default_config(spec, op.workloads(spec)[0].sizes, target)
    assert config.backend == "triton"
    assert_compiles(op, spec, config, target, spills=64)


@pytest.mark.parametrize(("op", "spec"), [(PREFILL, IndexerSpec(64, 128, scores="bf16")), (DECODE, PAIRS[2][1])])
def test_other_templates_do_not_serve_it(op, spec):
    for backend in set(op.backends) - {"triton"}:
        config = op.seed_config(type(spec)(64, 128), backend, H200)
        assert "scores" in {violation.name for violation in op.violations(spec, config, H200)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_of_what_both_can_hold_the_scores_are_those_of_fp8(dtype):
    """Values of few bits: e4m3 and every unquantised dtype hold them, and fp32 sums them without rounding."""
    inputs = exact_inputs.prefill(12, 300)
    quantised = dsa.indexer_logits(**inputs, clean=True)
    plain = {**inputs, "q": inputs["q"].to(dtype), "k": (inputs["k"].float() * inputs["k_scale"][:, None]).to(dtype)}
    scores = dsa.indexer_logits(**{**plain, "k_scale": None}, clean=True, scores="bf16")
    assert torch.equal(scores, quantised)
    chosen = dsa.index_select(**{**plain, "k_scale": None}, topk=64, scores="bf16", max_bytes=1)
    assert torch.equal(chosen, dsa.index_select(**inputs, topk=64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_paged_scores_are_those_of_the_keys_in_a_row(dtype):
    draw = Draw(3)
    inputs = dict(DECODE.inputs(PAIRS[3][1], Case(IndexerPagedSizes(3, 300), "ragged"), draw))
    inputs |= {"q": inputs["q"].to(dtype), "cache": inputs["cache"].to(dtype)}
    scores = dsa.indexer_logits_paged(**inputs, clean=True, scores="bf16").view(3, 3, 300)
    for row, pages in enumerate(inputs["page_table"]):
        present = (pages >= 0) & (pages < len(inputs["cache"]))
        keys = inputs["cache"][pages.where(present, 0).long()].flatten(0, 2)[:300]
        ends = inputs["lengths"][row]
        window = torch.zeros_like(ends), ends
        weights = inputs["weights"].view(3, 3, -1)[row].contiguous()
        expected = dsa.indexer_logits(inputs["q"][row], keys, None, weights, *window, clean=True, scores="bf16")
        expected = expected.masked_fill(~present.repeat_interleave(128)[:300], -math.inf)
        torch.testing.assert_close(scores[row], expected)
    chosen = dsa.index_select_paged(**inputs, topk=64, scores="bf16", max_bytes=1)
    ends, starts = inputs["lengths"].flatten(), None
    assert torch.equal(
        chosen.flatten(0, 1),
        dsa.select(scores.flatten(0, 1), ends, 64, starts=starts, page_table=inputs["page_table"], page=128),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_of_the_cpu_computes_in_what_came(dtype):
    """fp64 results differ from fp32 ones, and from an independent softmax of all tokens by fp64's rounding alone."""
    op = ops.get("attention")
    inputs = dict(op.inputs(AttentionSpec(3, 576, 64), Case(AttentionSizes(4, 50), "random"), Draw(2)))
    inputs |= {"q": inputs["q"].to(dtype), "kv": inputs["kv"].to(dtype)}
    out, lse = dsa.sparse_attention(inputs["q"], inputs["kv"], inputs["indices"], inputs["sm_scale"])
    scores = torch.einsum("qhd,td->qht", inputs["q"], inputs["kv"][:, 0]) * inputs["sm_scale"]
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, scores.softmax(-1) @ inputs["kv"][:, 0, :512])
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


def call(**changes):
    draw = Draw(0)
    starts = torch.zeros(3, dtype=torch.int32)
    values = {"q": draw.normal(3, 8, 64), "k": draw.normal(20, 64), "k_scale": None, "weights": draw.normal(3, 8)}
    return {**values, "starts": starts, "ends": starts + 20, "scores": "bf16", **changes}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("scores", {"scores": "fp32"}),
        ("q", {"q": torch.zeros(3, 8, 64).to(FP8)}),
        ("q", {"scores": "fp8"}),
        ("k", {"k": torch.zeros(20, 64, dtype=torch.bfloat16)}),
        ("k_scale", {"k_scale": torch.zeros(20)}),
        ("k_scale", {"q": torch.zeros(3, 8, 64).to(FP8), "k": torch.zeros(20, 64).to(FP8), "scores": "fp8"}),
    ],
    ids=str,
)
def test_call_refuses(argument, change):
    with pytest.raises(InputError, match=f"^{argument}"):
        dsa.indexer_logits(**call(**change))


@pytest.mark.parametrize(
    "cache",
    [
        IndexKLayout(64, 64).empty(4),
        torch.zeros(4, 64, 1, 64, dtype=torch.float64),
        torch.zeros(4, 64, 1, 32),
        torch.zeros(4, 64, 2, 64)[:, :, :1],
        torch.zeros(4, 64 * 64 + 8)[:, 8:].unflatten(1, (64, 1, 64)),
    ],
    ids=["quantised", "fp64", "width", "tokens apart", "blocks apart"],
)
def test_paged_call_refuses(cache):
    lengths, table = torch.full((1, 1), 9, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    for function, more in ((dsa.indexer_logits_paged, {}), (dsa.index_select_paged, {"topk": 64})):
        with pytest.raises(InputError, match=r"^cache"):
            function(torch.zeros(1, 1, 8, 64), cache, torch.zeros(1, 8), lengths, table, 64, scores="bf16", **more)


def test_a_model_may_state_it():
    """So that its kernels are tuned, verified and built like others; a layer, which quantises, refuses it."""
    model = dsa.Model.from_dict({**dsa.preset("tiny").to_dict(), "index_scores": "bf16"})
    for op in (PREFILL, DECODE):
        assert {spec.scores for spec in op.specs(model)} == {"bf16"}
        assert {spec.scores for spec in op.specs(dsa.preset("tiny"))} == {"fp8"}
    with pytest.raises(InputError, match=r"^model: got index_scores 'bf16'"):
        dsa.Layer(model)


def test_spec_refuses():
    for spec in (IndexerSpec, IndexerPagedSpec):
        with pytest.raises(SpecError, match="scores"):
            spec(8, 64, scores="fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_multiply_bf16_alone(dtype):
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in call().items()}
    with pytest.raises(InputError, match=r"^q: got torch.float.*bfloat16"):
        dsa.indexer_logits(**{**moved, "q": moved["q"].to(dtype), "k": moved["k"].to(dtype)})
    q, kv = torch.zeros(2, 4, 576, dtype=dtype, device="cuda"), torch.zeros(9, 1, 576, dtype=dtype, device="cuda")
    with pytest.raises(InputError, match=r"^q: got torch.float.*bfloat16"):
        dsa.sparse_attention(q, kv, torch.zeros(2, 1, 64, dtype=torch.int32, device="cuda"), 0.1)


@pytest.mark.gpu
@BY_SPEC
def test_kernels_match_the_reference(op, spec, config):
    sizes = IndexerSizes(700, 3000) if op is PREFILL else IndexerPagedSizes(40, 3000)
    inputs = op.inputs(spec, Case(sizes, "ragged"), Draw(7, "cuda"))
    tensors = {name: value for name, value in inputs.items() if name != "k_scale" or op is PREFILL}
    options = {"score": spec.score, "clean": True, "scores": "bf16"}
    function = dsa.indexer_logits if op is PREFILL else dsa.indexer_logits_paged
    accuracy = op.check(spec, inputs, {"logits": function(**tensors, **options)}, op.reference(spec, inputs))
    assert accuracy.passed, accuracy.detail
