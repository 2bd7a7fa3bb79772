"""Batch invariance: a row's bits whatever rows there are beside it, on the CPU, interpreted, and of all records on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from some_rows import BY_ROW, POISON, assert_same, outputs_of, rows_of

import dsa_codegen as dsa
from dsa_codegen import invariance, ops, paths
from dsa_codegen.errors import NoConfig
from dsa_codegen.functions import operators
from dsa_codegen.gpu import GPUS, detect
from dsa_codegen.kernels.build import build
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import AttentionSpec
from dsa_codegen.ops.attention_gqa import AttentionGqaSpec
from dsa_codegen.ops.attention_paged import AttentionPagedSpec, turns
from dsa_codegen.ops.index_prologue import IndexPrologueSpec
from dsa_codegen.ops.indexer import IndexerSpec
from dsa_codegen.ops.indexer_paged import IndexerPagedSpec
from dsa_codegen.ops.latent_prologue import LatentPrologueSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.exact import exactly
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import poison
from dsa_codegen.records import files, lookup

from support import H200, run_interpreted

SPECS = {
    "indexer": IndexerSpec(8, 64, batch_invariant=True),
    "indexer_bf16": IndexerSpec(8, 32, score="relu_bias", compressed=True, scores="bf16", batch_invariant=True),
    "indexer_paged": IndexerPagedSpec(8, 64, next_n=2, clean=True, batch_invariant=True),
    "indexer_paged_bf16": IndexerPagedSpec(8, 32, page=32, scores="bf16", clean=True, batch_invariant=True),
    "attention": AttentionSpec(5, 576, 96, lengths=True, sink=True, batch_invariant=True),
    "attention_gqa": AttentionGqaSpec(6, 2, 64, 32, 5, 16, ends=True, lengths=True, sink=True, batch_invariant=True),
    "attention_paged": AttentionPagedSpec(
        3, 128, "fp8_fp32_64", lengths=True, extra_topk=64, batch_invariant=True, d_v=192, d_rope=48
    ),
    "index_prologue": IndexPrologueSpec(8, 64, hadamard=True, batch_invariant=True),
    "latent_prologue": LatentPrologueSpec("v32", 512, norm="nope", batch_invariant=True),
}
SIZES = {
    "indexer": {"queries": 21, "context": 100},
    "indexer_paged": {"batch": 7, "context": 130},
    "attention": {"queries": 9, "tokens": 333},
    "attention_gqa": {"rows": 9, "tokens": 150},
    "attention_paged": {"batch": 7, "next_n": 1, "tokens": 300},
    "index_prologue": {"tokens": 13},
    "latent_prologue": {"tokens": 13},
}
CUTS = ((1,), (3, 5, 2))


def op_of(name):
    return ops.get(name.removesuffix("_bf16"))


def drawn(op, spec, sizes, device="cpu", ragged=True):
    case = Case(op.sizes_type.from_dict(sizes), "ragged" if ragged and "prologue" not in op.name else "normal")
    inputs = op.inputs(spec, case, Draw(11, device))
    if op.name.endswith("prologue"):
        inputs["cache"].view(torch.uint8).fill_(POISON)
    if op.name == "indexer":  # windows of nobody's: what lies outside of one is not compared
        inputs |= {"starts": torch.zeros_like(inputs["starts"]), "ends": torch.full_like(inputs["ends"], sizes["context"])}
    return inputs


def by_reference(op, spec):
    def run(inputs):
        with exactly():
            return op.reference(spec, inputs)

    return run


@pytest.mark.parametrize("name", SPECS)
def test_references_of_some_rows_are_those_of_all(name):
    op, spec = op_of(name), SPECS[name]
    inputs = drawn(op, spec, SIZES[op.name])
    whole = outputs_of(op, inputs, by_reference(op, spec), (rows_of(op, inputs),))
    for sizes in CUTS:
        assert_same(op, outputs_of(op, inputs, by_reference(op, spec), sizes), whole, sizes)


@pytest.mark.parametrize("name", SPECS)
def test_references_agree_with_those_of_free_order(name):
    op, spec = op_of(name), SPECS[name]
    inputs = drawn(op, spec, SIZES[op.name])
    result = op.check(
        spec, inputs, by_reference(op, spec)(inputs), by_reference(op, replace(spec, batch_invariant=False))(inputs)
    )
    assert result.passed, result.detail


SAME_ORDER = {
    "indexer_bf16": [
        Config.of("triton", block_q=16, block_n=64, num_warps=4, num_stages=stages, splits=splits)
        for stages, splits in ((3, 1), (2, 4))
    ],
    "indexer_paged_bf16": [
        Config.of("triton", schedule=schedule, block_n=64, block_q=1, num_warps=4, num_stages=stages, blocks_per_sm=blocks)
        for schedule, stages, blocks in (("split", 2, 4), ("persistent", 3, 1))
    ],
    "attention_paged": [
        Config.of("triton", block_h=16, block_n=32, num_stages=stages, num_warps=4, dequantize="bits", splits=1)
        for stages in (2, 3)
    ],
    "attention_gqa": [
        Config.of("triton", block_h=16, block_n=32, num_stages=stages, num_warps=2, splits=1) for stages in (3, 2)
    ],
    "index_prologue": [Config.of("triton", block_h=block_h, block_t=1, num_warps=4) for block_h in (8, 2)],
    "latent_prologue": [Config.of("triton", block_t=1, num_warps=2)],
}


@pytest.mark.parametrize("name", SAME_ORDER)
def test_interpreted_kernels_of_one_order_give_a_row_the_same_bits(interpreter, name):
    op, spec = op_of(name), SPECS[name]
    inputs = drawn(op, spec, SIZES[op.name])
    if op.name == "indexer":  # the interpreter multiplies as numpy does, where the place in a tile shows: exact products here
        inputs |= {name: inputs[name].round() for name in ("q", "k")}
    first = None
    for config, sizes in zip([*SAME_ORDER[name]] * 2, ((100,), (4, 1, 5)), strict=False):
        assert not op.violations(spec, config, H200)

        def run(given, config=config):
            return run_interpreted(interpreter, op.name, spec, config, given)

        found = outputs_of(op, inputs, run, sizes)
        if op.name == "indexer":  # columns behind a window's end hold what was there
            found = {"logits": found["logits"].masked_fill(found["logits"].isnan(), math.nan)}
        first = found if first is None else first
        assert_same(op, found, first, (config, sizes))


def models():
    return [replace(presets.preset(name), batch_invariant=True) for name in presets.names()]


@pytest.mark.parametrize("gpu", ["h100", "h200", "l40s", "b200"])
def test_whatever_serves_adds_up_in_one_order(gpu):
    """Of every model, for all sizes that have a record or default of their own."""
    for model in models() if gpu == "h200" else models()[:2]:
        for name in BY_ROW:
            op = ops.get(name)
            for spec in op.specs(model):
                found = {lookup.lookup(op, spec, case.sizes, GPUS[gpu]).config for case in op.workloads(spec)}
                assert {op.order(spec, config) for config in found} == {op.canonical(spec, GPUS[gpu])}


def test_kernels_of_no_order_are_excluded():
    attention, paged = ops.get("attention"), ops.get("attention_paged")
    together = AttentionSpec(8, 576, 2048, share=2, batch_invariant=True)
    few = attention.default_config(replace(together, batch_invariant=False), attention.sizes_type(4096, 32768), H200)
    assert attention.order(together, few) is None
    split = Config.of("gluon", splits=0)  # as many as end soonest, which the batch decides
    spec = AttentionPagedSpec(128, 2048, batch_invariant=True)
    assert {violation.name for violation in paged.violations(spec, split, H200)} == {"batch_invariant"}
    assert not paged.violations(replace(spec, batch_invariant=False), split, H200)
    other = paged.default_config(spec, paged.sizes_type(1, 1, 4096), H200).replace(splits=2)
    assert {violation.name for violation in paged.violations(spec, other, H200)} == {"batch_invariant"}


def test_an_operation_without_an_order_says_so(monkeypatch):
    op, spec = ops.get("attention"), AttentionSpec(8, 576, 200, batch_invariant=True)
    monkeypatch.setattr(type(op), "order", lambda self, spec, config: None)
    with pytest.raises(NoConfig, match="batch_invariant"):
        op.default_config(spec, op.sizes_type(1, 1), H200)


def test_records_of_one_order_serve_no_free_spec():
    op = ops.get("indexer")
    free, bound = IndexerSpec(64, 128), IndexerSpec(64, 128, batch_invariant=True)
    assert op.kin(bound, free.to_dict())
    assert not op.kin(free, bound.to_dict())


@pytest.mark.parametrize("next_n", [1, 3, 40])
@pytest.mark.parametrize("of_sequences", [False, True])
def test_rows_in_turns_are_all_rows_in_order(next_n, of_sequences):
    batch, heads, topk, most = 9, 2, 8, 8
    inputs = {
        "q": torch.randn(batch, next_n, heads, 4),
        "indices": torch.arange(batch * next_n * topk).view(batch, next_n, topk),
    }
    inputs |= {"lengths": torch.arange(batch) if of_sequences else torch.arange(batch * next_n).view(batch, next_n)}
    inputs |= {"extra_indices": None, "extra_lengths": None, "cache": torch.zeros(1), "sink": None}
    outputs = {"lse": torch.arange(batch * next_n * heads).view(batch, next_n, heads)}
    found = list(turns.in_turns(inputs, outputs, most))
    assert torch.cat([part["q"].flatten(0, 1) for part, _ in found]).equal(inputs["q"].flatten(0, 1))
    assert torch.cat([part["indices"].flatten(0, 1) for part, _ in found]).equal(inputs["indices"].flatten(0, 1))
    assert torch.cat([out["lse"].flatten(0, 1) for _, out in found]).equal(outputs["lse"].flatten(0, 1))
    for part, out in found:
        rows = part["q"].shape[0] * part["q"].shape[1]
        assert rows <= max(most, next_n if next_n <= most else 0)
        assert part["cache"] is inputs["cache"]
        assert part["lengths"].shape == (part["q"].shape[:1] if of_sequences else part["q"].shape[:2])
        assert out["lse"].is_contiguous()


def test_every_row_is_split_alike_however_many_there_are(interpreter, monkeypatch):
    """Where the parts of all rows would not fit, rows take turns instead of fewer splits."""
    op, spec = ops.get("attention_paged"), AttentionPagedSpec(2, 1024, lengths=True, batch_invariant=True)
    config = op.default_config(spec, op.sizes_type(1, 1, 300), GPUS["l40s"])
    assert config["splits"] == 2
    inputs = drawn(op, spec, {"batch": 9, "next_n": 1, "tokens": 300}, ragged=False)
    outputs = op.allocate(spec, inputs)
    assert len(op.launches(spec, config, inputs, outputs, H200)) == 2
    module = "dsa_codegen.ops.attention_paged.shared.PARTIAL_BYTES"
    monkeypatch.setattr(module, 4 * 512 * spec.heads * 2 * 4)  # parts of 4 rows
    launches = op.launches(spec, config, inputs, outputs, H200)
    assert [launch.kernel for launch in launches] == ["attention_paged", "combine"] * 3
    assert len(op.launches(replace(spec, batch_invariant=False), config, inputs, outputs, H200)) == 1


def test_a_process_or_a_model_may_ask_for_it(monkeypatch):
    model = presets.preset("tiny")
    assert not any(spec.batch_invariant for spec in ops.get("indexer").specs(model))
    assert all(spec.batch_invariant for name in BY_ROW for spec in ops.get(name).specs(replace(model, batch_invariant=True)))
    asked = []
    monkeypatch.setattr(operators, "sparse_attention", lambda *args, sms=None: asked.append(args[7]))
    q = torch.zeros(1, 2, 576)
    before = dsa.use_batch_invariant()
    try:
        assert not before
        assert invariance.always()
        assert ops.get("attention").specs(model)[0].batch_invariant
        assert dsa.Layer(model).model.batch_invariant
        dsa.sparse_attention(q, q, q, 1.0)
    finally:
        assert dsa.use_batch_invariant(False)
    dsa.sparse_attention(q, q, q, 1.0)
    dsa.sparse_attention(q, q, q, 1.0, batch_invariant=True)
    assert asked == [True, False, True]


def test_chunks_and_whole_calls_have_the_same_bits():
    draw = Draw(5)
    k, k_scale = dsa.quantize_index_k(draw.normal(1000, 64, dtype=torch.bfloat16))
    q, weights = dsa.quantize_index_q(draw.normal(37, 16, 64, dtype=torch.bfloat16), draw.normal(37, 16))
    ends = torch.arange(1000 - 36, 1001, dtype=torch.int32)
    call = q, k, k_scale, weights, torch.zeros_like(ends), ends
    whole = dsa.indexer_logits(*call, batch_invariant=True, clean=True)
    few = dsa.indexer_logits_chunks(*call, max_bytes=8 * 1024 * 4 * 2, batch_invariant=True, clean=True)
    assert torch.equal(torch.cat([chunk for _, chunk in few]), whole)
    scores = [torch.empty(37, 64) for _ in range(2)]
    chosen = dsa.index_select(*call, 64, batch_invariant=True, chosen_scores=scores[0])
    in_chunks = dsa.index_select(*call, 64, batch_invariant=True, max_bytes=8 * 1024 * 4, chosen_scores=scores[1])
    assert torch.equal(chosen, in_chunks)
    assert torch.equal(*scores)


ROWS_ON_A_GPU = {
    "indexer": {"queries": 1200, "context": 3000},
    "indexer_paged": {"batch": 70, "context": 9000},
    "attention": {"queries": 300, "tokens": 5000},
    "attention_gqa": {"rows": 300, "tokens": 5000},
    "attention_paged": {"batch": 70, "next_n": 2, "tokens": 70000},
    "index_prologue": {"tokens": 600},
    "latent_prologue": {"tokens": 600},
}
CUTS_ON_A_GPU = ((1200,), (1, 7, 64, 5), (16,), (133, 2))


def recorded(name):
    """By spec: configs of shipped records in the spec's order, and the default's where there are few."""
    op, found = ops.get(name), {}
    for record in files.read_all(paths.shipped_records(), name):
        spec = op.spec_type.from_dict({**record.spec, "batch_invariant": True})
        found.setdefault(spec, []).append(record.config_for(op))
    return op, found


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_ROW)
def test_all_records_give_a_row_the_same_bits_in_any_batch(name):
    op, found = recorded(name)
    gpu = detect()
    for spec, configs in found.items():
        inputs = drawn(op, spec, ROWS_ON_A_GPU[name], "cuda", ragged=name.endswith("paged"))
        fitting = [config for config in configs if not op.violations(spec, config, gpu)]
        sizes = op.sizes_type.from_dict(ROWS_ON_A_GPU[name])
        fitting.append(op.default_config(spec, sizes, gpu))
        first = None
        for config in dict.fromkeys(fitting):
            variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load())

            def run(given, variant=variant, spec=spec):
                outputs = op.allocate(spec, given)
                poison(outputs)
                return variant.run(given, outputs)

            for cut in CUTS_ON_A_GPU:
                outputs = outputs_of(op, inputs, run, cut)
                first = outputs if first is None else first
                assert_same(op, outputs, first, (spec, config, cut))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
@pytest.mark.parametrize("heads", [128, 16])
def test_public_calls_give_a_row_the_same_bits_in_any_batch(heads):
    """Whatever the dispatcher chooses for a batch: 1, some, hundreds of sequences; and of some SMs."""
    draw = Draw(3, "cuda")
    cache = dsa.ops.get("attention_paged").spec_type(heads, 2048).layout.empty(300, "cuda")
    latents = draw.normal(300 * 64, 576, dtype=torch.bfloat16)
    dsa.store_kv(latents[:, :512], latents[:, 512:], torch.arange(len(latents), device="cuda"), cache)
    q = draw.normal(600, 1, heads, 576, dtype=torch.bfloat16)
    indices = draw.integers(-1, len(latents), 600, 1, 2048)
    whole = dsa.sparse_attention_paged(q, cache, indices, 0.04, batch_invariant=True)
    kv = latents[:, None]
    flat = dsa.sparse_attention(q[:, 0], kv, indices, 0.04, batch_invariant=True)
    for rows in (1, 5, 40, 200):
        part = dsa.sparse_attention_paged(q[:rows], cache, indices[:rows], 0.04, batch_invariant=True, sms=rows + 3)
        assert all(torch.equal(few, all_[:rows]) for few, all_ in zip(part, whole, strict=True)), rows
        part = dsa.sparse_attention(q[:rows, 0], kv, indices[:rows], 0.04, batch_invariant=True)
        assert all(torch.equal(few, all_[:rows]) for few, all_ in zip(part, flat, strict=True)), rows
