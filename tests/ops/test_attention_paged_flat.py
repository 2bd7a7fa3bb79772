"""Paged attention by prefill's kernels: what is read back and listed, what is launched, when it serves; emulated as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.gpu import GPUS
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import staying
from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec, flat
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.problem.values import contains
from dsa_codegen.proof.verify import verify
from dsa_codegen.records import lookup
from dsa_codegen.runtime import dispatch

import emulator
from paged_designs import CLUSTERS
from support import FURTHER, H200, assert_compiles

FLAT = CLUSTERS.replace(flat=True)
SWEPT = FLAT.replace(sweep=True)
POOLS = AttentionPagedSpec(16, 70, "v4", lengths=True, sink=True, extra_topk=90, extra_page=2, extra_lengths=True)
NEEDS_COMPILER = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")


@pytest.mark.parametrize(
    "spec",
    [
        AttentionPagedSpec(128, 2048),
        pytest.param(POOLS, marks=FURTHER),
        pytest.param(AttentionPagedSpec(64, 512, "v4", lengths=True), marks=FURTHER),
        pytest.param(AttentionPagedSpec(16, 2048, "bf16", lengths=True), marks=FURTHER),
    ],
    ids=lambda spec: spec.id,
)
def test_it_compiles_for_hopper_without_spills(spec):
    assert_compiles(OP, spec, FLAT, spills=0)


def emulated(spec, folder, order="shuffled", sms=1, config=FLAT):
    return Variant(OP, spec, config, replace(H200, sms=sms), emulator.cuda_kernels(render(OP, spec, config), folder, order))


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "spec",
    [
        AttentionPagedSpec(16, 70, page=7, lengths=True, sink=True),
        POOLS,
        pytest.param(AttentionPagedSpec(9, 70, "v4"), marks=FURTHER),
        pytest.param(AttentionPagedSpec(64, 150, lengths=True), marks=FURTHER),
        pytest.param(AttentionPagedSpec(16, 70, "bf16", lengths=True), marks=FURTHER),
        pytest.param(AttentionPagedSpec(64, 70, "bf16", sink=True, d_rope=0), marks=FURTHER),
        pytest.param(AttentionPagedSpec(16, 70, "v41", d_rope=0), marks=FURTHER),
        pytest.param(AttentionPagedSpec(16, 70, "fp8_fp32_64", lengths=True), marks=FURTHER),
        pytest.param(AttentionPagedSpec(16, 70, "fp8_ue8m0_32", d_rope=64, rope_in_value=True), marks=FURTHER),
    ],
    ids=lambda spec: spec.id,
)
def test_matches_the_reference(spec, tmp_path):
    variant = emulated(spec, tmp_path)
    for case in OP.cases(spec):
        accuracy = verify(variant, case, "cpu")
        assert accuracy.passed, (case.id, accuracy.detail)


@NEEDS_COMPILER
def test_only_chunks_that_are_listed_are_read_back(tmp_path, monkeypatch):
    """A row beyond its length names none; chunks grow where there are too many to mark."""
    monkeypatch.setattr(flat, "_MOST_CHUNKS", 5)
    spec = AttentionPagedSpec(8, 40, lengths=True)
    variant = emulated(spec, tmp_path, "descending", sms=3)
    inputs = dict(OP.inputs(spec, Case(AttentionPagedSizes(40, 1, 580), "random"), Draw(2)))
    inputs["indices"] = inputs["indices"] % 128 + 256
    inputs["indices"][:, :, 20:] = 600
    inputs["lengths"][:] = 20
    inputs["indices"][7, 0, 3] = 639
    mark, back, *_ = launches = OP.launches(spec, FLAT, inputs, OP.allocate(spec, inputs), variant.gpu)
    (latents,) = (arg for arg in back.args if isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16)
    latents.fill_(7)
    for launch in launches[:2]:
        variant.kernels[launch.kernel](launch.grid, launch.args)
    assert mark.grid == (3, 1, 1) and back.grid == (10, 1, 1)
    slots = torch.arange(640)
    expected = spec.layout.dequantize(inputs["cache"], slots).bfloat16()
    read = (slots // 128 == 2) | (slots // 128 == 4)
    assert latents[read, 0].equal(expected[read])
    assert (latents[~read] == 7).all()


@NEEDS_COMPILER
def test_lists_that_are_sorted_are_marked_as_they_are_read(tmp_path, monkeypatch):
    """Where one launch sorts all of them; sequences whose rows are not evenly apart are sorted one after another."""
    monkeypatch.setattr(staying, "_SORTED_FROM", 1)
    spec = AttentionPagedSpec(5, 70, lengths=True, sink=True)
    variant = emulated(spec, tmp_path, sms=2, config=SWEPT)
    inputs = dict(OP.inputs(spec, Case(AttentionPagedSizes(2, 9, 300), "ragged"), Draw(3)))
    inputs["indices"] = torch.where(inputs["indices"] // 64 == 2, 0, inputs["indices"])
    inputs["lengths"] = torch.tensor([70, 33], dtype=torch.int32)
    together, apart = inputs["q"], torch.cat((inputs["q"], inputs["q"]), 1)[:, :9]
    once, turns = ["spread", "sort", "read_back", "attention"], ["mark", "read_back", "spread", *["sort", "attention"] * 2]
    for inputs["q"], names in ((together, once), (apart, turns)):
        outputs = OP.allocate(spec, inputs)
        launches = OP.launches(spec, SWEPT, inputs, outputs, variant.gpu)
        assert [launch.kernel for launch in launches] == names
        (back,) = (launch for launch in launches if launch.kernel == "read_back")
        (latents,) = (arg for arg in back.args if isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16)
        latents.fill_(7)
        for launch in launches:
            variant.kernels[launch.kernel](launch.grid, launch.args)
        assert OP.check(spec, inputs, outputs, OP.reference(spec, inputs)).passed
        assert (latents[128:192] == 7).all()
        assert not (latents[:64] == 7).all()


@NEEDS_COMPILER
def test_blocks_of_bf16_rows_may_lie_apart(tmp_path):
    """As those of a cache that holds several layers; lists then count in steps that divide both distances."""
    spec = AttentionPagedSpec(8, 70, "bf16", page=16)
    inputs = dict(OP.inputs(spec, Case(AttentionPagedSizes(2, 2, 100), "ragged"), Draw(4)))
    expected = OP.reference(spec, inputs)
    apart = torch.full((len(inputs["cache"]), 16 * 576 + 64), torch.nan, dtype=torch.bfloat16)
    apart[:, : 16 * 576] = inputs["cache"].flatten(1)
    inputs["cache"] = apart[:, : 16 * 576].view(-1, 16, 1, 576)
    variant, outputs = emulated(spec, tmp_path), OP.allocate(spec, inputs)
    assert [launch.kernel for launch in variant.launch(inputs, outputs)] == ["relist", "attention"]
    assert OP.check(spec, inputs, outputs, expected).passed


def test_rows_that_are_not_evenly_apart_go_by_sequences():
    spec = AttentionPagedSpec(64, 300, "bf16", lengths=True)
    inputs = dict(OP.inputs(spec, Case(AttentionPagedSizes(3, 2, 400), "random"), Draw(1)))
    outputs = OP.allocate(spec, inputs)
    names = [launch.kernel for launch in OP.launches(spec, FLAT, inputs, outputs, H200)]
    assert names == ["spread", "attention"]
    inputs["q"] = torch.zeros(3, 4, 64, 576, dtype=torch.bfloat16)[:, :2]
    names = [launch.kernel for launch in OP.launches(spec, FLAT, inputs, outputs, H200)]
    assert names == ["spread", "attention", "attention", "attention"]


def test_launches_name_the_tensors_of_the_call():
    """Not views that begin where they do: so that a plan knows them again."""
    spec = AttentionPagedSpec(64, 2048, "bf16")
    inputs = OP.inputs(spec, Case(AttentionPagedSizes(1, 1, 4096), "random"), Draw(1))
    outputs = OP.allocate(spec, inputs)
    main, joining = OP.launches(spec, FLAT, inputs, outputs, H200)
    for tensor in (inputs["q"], inputs["cache"], inputs["indices"]):
        assert any(tensor is arg for arg in main.args)
    assert all(any(tensor is arg for arg in joining.args) for tensor in outputs.values())


PROMPT, DECODE = AttentionPagedSizes(4096, 1, 1 << 15), AttentionPagedSizes(64, 1, 1 << 20)


@pytest.mark.parametrize(
    ("spec", "sizes", "first"),
    [
        (AttentionPagedSpec(128, 2048), PROMPT, True),
        (AttentionPagedSpec(16, 2048), AttentionPagedSizes(1, 4096, 1 << 20), True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(512, 1, 1 << 16), True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(300, 1, 1 << 17), True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(256, 1, 1 << 17), False),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(97, 1, 1 << 15), True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(96, 1, 1 << 15), False),
        (AttentionPagedSpec(64, 2048), AttentionPagedSizes(1, 300, 1 << 15), True),
        (AttentionPagedSpec(64, 2048), AttentionPagedSizes(75, 4, 1 << 15), True),
        (AttentionPagedSpec(64, 2048), AttentionPagedSizes(300, 1, 300 << 15), False),
        (AttentionPagedSpec(64, 2048), AttentionPagedSizes(65, 1, 1 << 14), True),
        (AttentionPagedSpec(16, 2048), AttentionPagedSizes(65, 1, 1 << 14), False),  # tokens stream
        (AttentionPagedSpec(16, 2048), AttentionPagedSizes(129, 1, 1 << 15), True),
        (AttentionPagedSpec(16, 2048), AttentionPagedSizes(400, 1, 1 << 17), False),
        (AttentionPagedSpec(64, 512, "v4"), AttentionPagedSizes(300, 1, 1 << 15), True),
        (AttentionPagedSpec(64, 512, "v4"), AttentionPagedSizes(160, 1, 1 << 13), False),
        (AttentionPagedSpec(64, 128, "v4", extra_topk=512), AttentionPagedSizes(400, 1, 1 << 16), True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(1000, 1, 1 << 20), False),
        (AttentionPagedSpec(64, 512, "v4"), AttentionPagedSizes(4096, 1, 1 << 20), False),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(4096, 1, (1 << 20) + 1), False),
        (AttentionPagedSpec(128, 2048), DECODE, False),
        (AttentionPagedSpec(128, 2048, batch_invariant=True), PROMPT, False),
        (AttentionPagedSpec(100, 2048), PROMPT, False),
        (AttentionPagedSpec(128, 2048, "bf16"), DECODE, True),
        (AttentionPagedSpec(128, 2048, "bf16", batch_invariant=True), DECODE, True),
        (AttentionPagedSpec(16, 2048, "bf16"), AttentionPagedSizes(1, 1, 1 << 16), False),
        (AttentionPagedSpec(64, 2048, "bf16", extra_topk=64), PROMPT, False),
        (AttentionPagedSpec(64, 2048, "fp8_ue8m0_32", d_rope=0), PROMPT, True),
        (AttentionPagedSpec(64, 2048, "fp8_tensor", d_rope=0), PROMPT, False),
    ],
)
def test_it_serves_without_a_record(spec, sizes, first, tmp_path):
    found = lookup.lookup(OP, spec, sizes, H200, {"tuned": tmp_path})
    assert bool(found.config.backend == "cuda" and found.config["flat"]) == first


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_records_of_decode_steps_serve_no_prompt_of_as_many_rows(heads):
    """They state how many sequences a step has; of rows over few slots a bucket states how many there are."""
    spec, sizes = AttentionPagedSpec(heads, 2048), AttentionPagedSizes(300, 1, 1 << 15)
    stated = (("batch", 65, 512),)
    assert contains(stated, replace(sizes, tokens=300 << 15).bucket())
    assert not contains(stated, sizes.bucket())
    assert lookup.lookup(OP, spec, sizes, H200).config["flat"]


def test_rows_over_few_slots_share_a_bucket_in_whatever_sequences():
    buckets = {AttentionPagedSizes(*size, 1 << 15).bucket() for size in ((300, 1), (75, 4), (1, 300), (320, 1))}
    assert buckets == {(("batch", 0, 512), ("rows", 257, 321), ("tokens", 16385, 40961))}
    assert AttentionPagedSizes(300, 1, (1 << 17) + 1).bucket() == (("batch", 133, 512),)


@pytest.mark.parametrize(
    ("spec", "sizes", "swept"),
    [
        (AttentionPagedSpec(128, 2048), PROMPT, True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(1, 4096, 1 << 15), True),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(4096, 1, 16384), False),
        (AttentionPagedSpec(128, 2048), AttentionPagedSizes(512, 1, 1 << 15), False),
        (AttentionPagedSpec(64, 2048), PROMPT, False),
        (AttentionPagedSpec(64, 2048), AttentionPagedSizes(1, 4096, 1 << 17), True),
        (AttentionPagedSpec(16, 2048), PROMPT, False),
        (AttentionPagedSpec(16, 2048), AttentionPagedSizes(4096, 1, 1 << 17), True),
        (AttentionPagedSpec(128, 2048, "bf16"), PROMPT, True),
        (AttentionPagedSpec(64, 2048, "bf16"), DECODE, False),
        (AttentionPagedSpec(64, 512, "v4"), PROMPT, False),
        (AttentionPagedSpec(64, 1024, "v4"), AttentionPagedSizes(4096, 1, 1 << 16), True),
        (AttentionPagedSpec(16, 512, "v4"), AttentionPagedSizes(4096, 1, 1 << 16), True),
        (AttentionPagedSpec(64, 2048, extra_topk=64), PROMPT, False),
        (AttentionPagedSpec(128, 2048, "bf16", batch_invariant=True), PROMPT, False),
    ],
)
def test_lists_are_sorted_by_default_where_that_was_faster(spec, sizes, swept):
    config = OP.default_config(spec, sizes, H200)
    assert config["flat"]
    assert config["sweep"] == swept


def test_lists_of_two_pools_are_not_sorted():
    assert [found.name for found in OP.violations(POOLS, SWEPT, H200)] == ["sweep"]


def test_no_other_gpu_has_it():
    assert OP.default_config(AttentionPagedSpec(128, 2048, "bf16"), PROMPT, GPUS["a100"]).backend == "triton"
    assert not OP.violations(AttentionPagedSpec(128, 2048), FLAT, H200, PROMPT.bucket())
    (broken,) = OP.violations(AttentionPagedSpec(128, 2048), FLAT, H200, DECODE.bucket())
    assert broken.name == "slots"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionPagedSpec(128, 2048), FLAT),
        (AttentionPagedSpec(128, 2048), SWEPT),
        (AttentionPagedSpec(16, 2048, lengths=True), SWEPT),
        (POOLS, FLAT),
        (AttentionPagedSpec(64, 300, "bf16"), FLAT),
        (AttentionPagedSpec(64, 300, "bf16"), SWEPT),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionPagedSpec) else "swept" if value["sweep"] else "",
)
def test_a_prompt_in_a_graph_on_a_gpu(spec, config):
    """Replayed with other lists, over a cache that holds several layers."""
    inputs = dict(OP.inputs(spec, Case(AttentionPagedSizes(1, 600, 20000), "ragged"), Draw(5, "cuda")))
    cache = inputs["cache"]
    layers = torch.zeros(len(cache), 3, *cache.shape[1:], dtype=cache.dtype, device="cuda")
    layers[:, 1] = cache
    inputs["cache"] = layers[:, 1]
    options = {name: inputs[name] for name in ("lengths", "sink", "extra_cache", "extra_indices", "extra_lengths")}
    options |= {"layout": "bf16"} if spec.kv_layout == "bf16" else {}

    def attend():
        return dsa.sparse_attention_paged(*(inputs[name] for name in ("q", "cache", "indices", "sm_scale")), **options)

    graph = torch.cuda.CUDAGraph()
    with dispatch.override(OP, config):
        attend()
        with torch.cuda.graph(graph):
            out, lse = attend()
    inputs["indices"].copy_(inputs["indices"].flip(1))
    out.fill_(torch.nan), lse.fill_(torch.nan)
    graph.replay()
    accuracy = OP.check(spec, inputs, {"out": out, "lse": lse}, OP.reference(spec, inputs))
    assert accuracy.passed, accuracy.detail
