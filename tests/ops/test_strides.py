"""Strides: rows that are parts of wider ones are served; of dimensions of size 1 torch leaves any, and nobody may read them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.compat import flash_mla
from dsa_codegen.errors import InputError
from dsa_codegen.gpu import detect
from dsa_codegen.kernels.build import build, folder_of
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import AttentionSizes, AttentionSpec
from dsa_codegen.ops.attention_gqa import AttentionGqaSizes, AttentionGqaSpec
from dsa_codegen.ops.attention_paged import AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.ops.indexer import OP as INDEXER
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.ops.indexer_paged import OP as INDEXER_PAGED
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.ops.quantize import QuantizeSizes, QuantizeSpec
from dsa_codegen.ops.select import SelectSpec
from dsa_codegen.problem.checks import settled
from dsa_codegen.problem.compare import same_bits
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import poison
from dsa_codegen.runtime import dispatch

from attention_configs import RING
from layer_inputs import TINY, decode_inputs, prefill_inputs
from paged_designs import CLUSTERS
from support import H200, arguments, run_interpreted

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def odd(value):
    """The same tensor, with a stride of 7 in every dimension of size 1."""
    if not isinstance(value, torch.Tensor) or 1 not in value.shape:
        return value
    strides = [7 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True)]
    return value.as_strided(value.shape, strides)


@pytest.mark.parametrize(
    ("shape", "strides", "settles"),
    [
        ((1, 4), (7, 1), (4, 1)),
        ((3, 1, 4), (8, 7, 1), (8, 4, 1)),
        ((5, 1), (1, 7), (1, 1)),
        ((1, 1), (7, 9), (1, 1)),
        ((1, 3, 4), (7, 8, 1), (24, 8, 1)),
        ((2, 3), (5, 1), (5, 1)),
    ],
)
def test_strides_of_size_one_become_those_of_packed_dimensions(shape, strides, settles):
    assert settled(torch.zeros(64).as_strided(shape, strides)).stride() == settles


def test_a_tensor_that_needs_nothing_is_left_alone():
    for tensor in (torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(0, 1)):
        assert settled(tensor) is tensor


def test_descriptors_of_one_block_and_of_one_key_can_be_encoded():
    """TMA takes strides of whole 16 bytes, whatever is behind them."""
    for op, spec, sizes, config in (
        (INDEXER_PAGED, IndexerPagedSpec(8, 64), IndexerPagedSizes(1, 1), "gluon"),
        (INDEXER, IndexerSpec(8, 64), IndexerSizes(1, 1), "gluon"),
    ):
        case = Case(sizes, "full" if op is INDEXER_PAGED else "causal")
        inputs = op.inputs(spec, case, Draw(0))
        if "cache" in inputs:
            inputs["cache"] = inputs["cache"][:1]
        spec, sizes, bound = op.bind(*map(odd, arguments(op, spec, inputs)))
        config = op.default_config(spec, sizes, H200, config)
        (launch,) = op.launches(spec, config, bound, op.allocate(spec, bound), H200)
        views = [value for value in launch.args if hasattr(value, "encoded")]
        assert len(views) == 2
        for view in views:
            assert all(stride % 16 == 0 for stride in view.strides[:-1])  # 4-byte scales come in pages of 64


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_gives_the_same(device):
    layer = dsa.Layer(TINY)
    for inputs, call in (
        (prefill_inputs(TINY, 1, 1, device), layer.prefill),
        (decode_inputs(TINY, 1, 1, 1, device), layer.decode),
    ):
        if "kv_cache" in inputs:
            inputs["kv_cache"], inputs["index_cache"] = inputs["kv_cache"][:1], inputs["index_cache"][:1]
            inputs["page_table"] = torch.zeros_like(inputs["page_table"])
        plain = call(**inputs)
        strided = call(**{name: odd(value) for name, value in inputs.items()})
        assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


WIDE = {
    "indexer": (IndexerSpec(8, 32, clean=True), IndexerSizes(3, 70), "ragged"),
    "indexer_paged": (IndexerPagedSpec(8, 32, next_n=2, clean=True), IndexerPagedSizes(2, 90), "ragged"),
    "quantize": (QuantizeSpec(32, 8, "fp32"), QuantizeSizes(5), "normal"),
    "attention": (AttentionSpec(20, 576, 70, lengths=True), AttentionSizes(4, 90), "ragged"),
    "attention_gqa": (AttentionGqaSpec(4, 2, 32, 32, 3, 32, page=32, ends=True), AttentionGqaSizes(4, 90), "ragged"),
    "attention_paged": (AttentionPagedSpec(5, 20, page=61), AttentionPagedSizes(2, 2, 130), "ragged"),
}
"""For each operation a spec, sizes and a distribution; its rows of q, keys, weights and lists come as parts of wider ones."""
PARTS = ("q", "k", "v", "kv", "source", "weights", "indices")
SAMPLED = Config.of(
    "tilelang",
    **{"scheme": "row", "capacity": 256, "threads": 256, "vectors": 1, "bins_log2": 10, "sample_vectors": 1, "whole": False},
    **{"blocks_per_sm": 1, "splits": 1},
)
LAYER_PARTS = ("q", "kv", "index_q", "index_weights", "index_k")
TRITON = {
    "indexer": Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=2),
    "indexer_paged": Config.of(
        "triton", schedule="persistent", block_n=64, block_q=1, num_warps=4, num_stages=2, blocks_per_sm=1
    ),
    "quantize": Config.of("triton", block_t=16, num_warps=4),
    "attention": Config.of("triton", block_h=16, block_n=32, num_stages=2, num_warps=4),
    "attention_gqa": Config.of("triton", block_h=16, block_n=32, num_stages=2, num_warps=4, splits=2),
    "attention_paged": Config.of("triton", block_h=16, block_n=16, num_stages=2, num_warps=4, dequantize="bits", splits=2),
}


def apart(value):
    """The same values as a part of wider rows, which lie in another order; what lies between is NaN, or 7."""
    beside = 16 // value.element_size()
    order = value.transpose(0, 1) if value.dim() > 2 else value
    wide = torch.full((*order.shape[:-1], order.shape[-1] + 2 * beside), 7.0, device=value.device)
    wide = (wide * math.nan if value.dtype.is_floating_point else wide).to(value.dtype)
    part = (wide.transpose(0, 1) if value.dim() > 2 else wide)[..., beside:-beside]
    part.copy_(value)
    assert not part.is_contiguous()
    return part


def wide_inputs(name, device="cpu", spec=None):
    """(spec, inputs, the same inputs as parts of wider rows)."""
    own, sizes, distribution = WIDE[name]
    spec = spec or own
    inputs = ops.get(name).inputs(spec, Case(sizes, distribution), Draw(3, device))
    taken = {key: apart(value) if key in PARTS and value is not None else value for key, value in inputs.items()}
    return spec, inputs, taken


def bound(name, spec, inputs):
    """The inputs as ``bind`` passes them on."""
    op = ops.get(name)
    return {**inputs, **op.bind(*arguments(op, spec, inputs))[2]}


@pytest.mark.parametrize("name", WIDE)
def test_parts_of_wider_rows_are_served_on_the_cpu(name):
    op = ops.get(name)
    spec, inputs, taken = wide_inputs(name)
    plain, strided = (op.reference(spec, bound(name, spec, each)) for each in (inputs, taken))
    assert all(same_bits(plain[key], strided[key]) for key in plain)


@pytest.mark.parametrize("name", WIDE)
def test_parts_of_wider_rows_are_served_by_triton(interpreter, name):
    spec, inputs, taken = wide_inputs(name)
    plain, strided = (
        run_interpreted(interpreter, name, spec, TRITON[name], bound(name, spec, each)) for each in (inputs, taken)
    )
    assert all(same_bits(plain[key], strided[key]) for key in plain)


MANY_HEADS = AttentionSpec(128, 576, 70, lengths=True)
ON_HOPPER = [
    (
        "indexer",
        Config.of("gluon", accumulators=1, block_n=64, num_stages=2, blocks_per_sm=2, edges=False, unrolled=False),
        None,
    ),
    (
        "indexer",
        Config.of("tilelang", block_q=2, block_n=64, num_stages=2, splits=1, pipeline="plain", threads=128, blocks_per_sm=1),
        None,
    ),
    (
        "indexer_paged",
        Config.of("gluon", part_queries=1, block_n=64, num_stages=2, accumulators=1, blocks_per_sm=2, gathered=1),
        None,
    ),
    (
        "attention",
        Config.of(
            "cuda",
            num_stages=3,
            turns=True,
            interleave=False,
            l2_prefetch=256,
            sweep=False,
            value_tokens=64,
            consumer_registers=224,
        ),
        AttentionSpec(128, 576, 70, lengths=True),
    ),
    (
        "attention",
        RING,
        AttentionSpec(8, 576, 70, lengths=True),
    ),
    ("attention", Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384), None),
    ("attention", Config.of("tilelang", pipeline="multistage", block_h=32, block_n=64, num_stages=2, threads=256), None),
    ("attention_paged", Config.of("gluon", splits=2), None),
    (
        "attention_paged",
        CLUSTERS.replace(splits=2),
        None,
    ),
    (
        "attention_paged",
        CLUSTERS.replace(sharers=4),
        None,
    ),
    (
        "attention_paged",
        CLUSTERS.replace(sharers=4, columns=16),
        None,
    ),
    (
        "attention_paged",
        CLUSTERS.replace(head_rounds=1),
        None,
    ),
    (
        "attention_paged",
        CLUSTERS.replace(splits=2, columns=16),
        None,
    ),
]
ON_GPU = [*ON_HOPPER, *((name, config, None) for name, config in TRITON.items())]


@pytest.mark.parametrize(("name", "config", "spec"), ON_HOPPER, ids=lambda value: getattr(value, "backend", None))
def test_a_launch_is_told_the_strides(name, config, spec):
    """Without a copy: the very tensors, and their strides where the language does not read these by itself."""
    op = ops.get(name)
    spec, _, taken = wide_inputs(name, spec=spec)
    inputs = bound(name, spec, taken)
    launch = op.launches(spec, config, inputs, op.allocate(spec, inputs), H200)[0]
    given = {id(value) for value in launch.args} | {id(getattr(value, "tensor", None)) for value in launch.args}
    for key in PARTS:
        if inputs.get(key) is not None:
            assert id(taken[key]) in given
    if config.backend != "tilelang":
        strides = {taken["q"].stride(dimension) * taken["q"].element_size() // 16 for dimension in range(2)}
        told = set(launch.args)
        for value in launch.args:
            if hasattr(value, "encoded"):
                told |= {stride // 16 for stride in value.strides}
        assert strides <= told or strides <= {number // 8 for number in launch.args if type(number) is int}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "config", "spec"), ON_GPU, ids=lambda value: getattr(value, "backend", None))
def test_parts_of_wider_rows_are_served_on_a_gpu(name, config, spec):
    op, gpu = ops.get(name), detect()
    spec, inputs, taken = wide_inputs(name, "cuda", spec)
    if op.violations(spec, config, gpu):
        pytest.skip(f"not for {gpu.name}")
    variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load())
    results = []
    for each in (inputs, taken):
        outputs = op.allocate(spec, bound(name, spec, each))
        poison(outputs)
        results.append(variant.run(bound(name, spec, each), outputs))
    assert all(same_bits(results[0][key], results[1][key]) for key in results[0])
    accuracy = op.check(spec, inputs, results[1], op.reference(spec, inputs))
    assert accuracy.passed, accuracy.detail


@pytest.mark.parametrize(
    ("name", "argument"), [("attention", "q"), ("attention", "kv"), ("indexer", "k"), ("indexer_paged", "q")]
)
def test_a_stride_that_no_kernel_serves_names_the_reason(name, argument):
    spec, inputs, _ = wide_inputs(name)
    value = inputs[argument]
    width = value.shape[-1]
    odd_rows = torch.zeros(*value.shape[:-1], width + 1, dtype=torch.float32).to(value.dtype)[..., :width]
    same_row = value[:1].expand(value.shape)
    for part, reason in ((odd_rows, "16 bytes at a time"), (same_row, "do not overlap")):
        with pytest.raises(InputError, match=f"^{argument}: got .*{reason}"):
            bound(name, spec, {**inputs, argument: part})
    with pytest.raises(InputError, match=f"^{argument}: got .*contiguous last dimension"):
        bound(name, spec, {**inputs, argument: torch.stack([value, value], -1)[..., 0]})


@pytest.mark.parametrize(
    ("name", "config", "own", "other"),
    [
        ("attention", ON_HOPPER[3][1], MANY_HEADS, {"topk": 999}),
        ("attention", ON_HOPPER[4][1], ON_HOPPER[4][2], {"topk": 999}),
        ("attention", ON_HOPPER[5][1], None, {"topk": 999}),
        ("attention", TRITON["attention"], None, {"topk": 999}),
        ("attention_paged", ON_HOPPER[7][1], None, {"topk": 999, "page": 32}),
        ("attention_paged", TRITON["attention_paged"], None, {"topk": 999, "page": 7}),
        ("indexer_paged", ON_HOPPER[2][1], None, {"page": 256}),
        ("select", SAMPLED, SelectSpec(64, output="slots"), {"topk": 99}),  # its page is known: divided by, it costs 6.6 %
    ],
    ids=lambda value: getattr(value, "backend", None),
)
def test_one_build_serves_all_lists_and_pages(name, config, own, other):
    """A new topk, or page where that costs nothing, compiles nothing: a build is found by its code, which does not name it."""
    spec, backend = own or WIDE[name][0], config.backend
    first, second = (render(ops.get(name), each, config) for each in (spec, replace(spec, **other)))
    assert first.code == second.code
    if backend != "tilelang":  # takes seconds to say its version
        assert folder_of(first, H200) == folder_of(second, H200)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_another_list_length_and_page_compile_nothing_on_a_gpu():
    """What a first request of a new shape waits for is counted: nothing, where only these differ."""
    waited = []
    for topk, page in ((64, 64), (96, 32), (200, 16)):
        spec = AttentionPagedSpec(16, topk, page=page)
        inputs = ops.get("attention_paged").inputs(spec, Case(AttentionPagedSizes(20, 1, 500), "random"), Draw(1, "cuda"))
        q, kv = inputs["q"][:, 0], torch.randn(300, 1, 576, device="cuda").bfloat16()
        with dispatch.override(ops.get("attention_paged"), TRITON["attention_paged"].replace(splits=1)):
            dsa.sparse_attention_paged(*(inputs[name] for name in ("q", "cache", "indices", "sm_scale")))
        with dispatch.override(ops.get("attention"), TRITON["attention"]):
            dsa.sparse_attention(q, kv, inputs["indices"], inputs["sm_scale"])
        waited.append(sum(count for name, count in dsa.stats().items() if name.endswith("built during a call")))
    assert waited[0] == waited[1] == waited[2]


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_takes_parts_of_wider_rows(device):
    layer = dsa.Layer(TINY)
    for inputs, call in (
        (prefill_inputs(TINY, 3, 90, device), layer.prefill),
        (decode_inputs(TINY, 2, 2, 150, device), layer.decode),
    ):
        taken = {name: apart(value) if name in LAYER_PARTS else value for name, value in inputs.items()}
        assert all(torch.equal(a, b) for a, b in zip(call(**inputs), call(**taken), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_an_engines_functions_pass_strides_on(device):
    """As FlashMLA's own tests have them: every argument a part of something wider."""
    for name, call in (
        ("attention", lambda q, kv, indices, **_: flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.04)),
        (
            "attention_paged",
            lambda q, cache, indices, **_: flash_mla.flash_mla_with_kvcache(q, cache, None, None, 512, None, indices=indices),
        ),
    ):
        _, inputs, taken = wide_inputs(name, device)
        if "cache" in inputs:  # of three layers
            record = torch.full((len(inputs["cache"]), 3, *inputs["cache"].shape[1:]), 0x7F, dtype=torch.uint8, device=device)
            record[:, 1] = inputs["cache"]
            taken["cache"] = record[:, 1]
        for plain, strided in zip(call(**inputs), call(**taken), strict=True):
            assert torch.equal(plain, strided)
