"""What engines do to kernels: huge tensors, garbage behind the lengths, captures, streams, threads, devices, traces."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.ops.attention import AttentionSizes, AttentionSpec
from dsa_codegen.ops.attention_paged import AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem import compare
from dsa_codegen.problem.caches import IndexKLayout, KvV32Layout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from layer_inputs import TINY, decode_inputs, prefill_inputs
from support import run_interpreted

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ON_EVERY_DESIGN = [("cpu", 16), *(pytest.param("cuda", heads, marks=pytest.mark.gpu) for heads in (16, 64, 128))]
LAYER = dsa.Layer(TINY)
SMALL = Config.of("triton", block_h=16, block_n=32, num_stages=2, num_warps=4)


def assert_same(a, b):
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_page_table_may_be_longer_than_the_lengths(device):
    inputs = decode_inputs(TINY, 3, 1, 200, device)
    plain = LAYER.decode(**inputs)
    garbage = torch.tensor([-1, 1 << 30, -(1 << 31), 3], dtype=torch.int32, device=device).expand(3, 4)
    longer = torch.cat([inputs["page_table"], garbage], 1)
    for row, length in enumerate(inputs["lengths"][:, 0].tolist()):
        longer[row, -(-length // TINY.page) : 4] = 1 << 30
    assert_same(plain, LAYER.decode(**{**inputs, "page_table": longer}))


@pytest.mark.parametrize("device", DEVICES)
def test_keys_behind_the_length_may_be_broken(device):
    inputs = decode_inputs(TINY, 2, 1, 200, device)
    inputs["lengths"].fill_(130)
    plain = LAYER.decode(**inputs)
    behind = inputs["page_table"][:, 130 // TINY.page].long()
    layout = IndexKLayout(TINY.page, TINY.index_head_dim)
    slots = (behind[:, None] * TINY.page + torch.arange(130 % TINY.page, TINY.page, device=device)).flatten()
    keys = torch.full((len(slots), TINY.index_head_dim), math.nan, device=device).to(torch.float8_e4m3fn)
    layout.pack(inputs["index_cache"], slots, keys, torch.full((len(slots),), math.nan, device=device))
    assert_same(plain, LAYER.decode(**inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_caches_of_several_layers_may_share_a_record(device):
    inputs = decode_inputs(TINY, 2, 1, 200, device)
    plain = LAYER.decode(**inputs)
    for name in ("kv_cache", "index_cache"):
        record = torch.full((len(inputs[name]), 3, *inputs[name].shape[1:]), 0x7F, dtype=torch.uint8, device=device)
        record[:, 1] = inputs[name]
        inputs[name] = record[:, 1]
    assert_same(plain, LAYER.decode(**inputs))


@pytest.mark.parametrize(("device", "heads"), ON_EVERY_DESIGN)
def test_a_token_that_is_listed_thrice_counts_thrice(device, heads):
    draw = Draw(1, device)
    q, kv = draw.normal(1, heads, 576, dtype=torch.bfloat16), draw.normal(9, 1, 576, dtype=torch.bfloat16, scale=0.1)
    indices = torch.full((1, 1, 64), -1, dtype=torch.int32, device=device)
    indices[..., :4] = torch.tensor([3, 5, 3, 3], dtype=torch.int32)
    out, lse = dsa.sparse_attention(q, kv, indices, 0.1)
    scores = q[0].float() @ kv[[3, 5], 0].float().T * 0.1 + torch.tensor([math.log(3.0), 0.0], device=device)
    torch.testing.assert_close(lse[0], scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0].float(), scores.softmax(-1) @ kv[[3, 5], 0, :512].float(), rtol=2e-2, atol=2e-3)


def sink_inputs(device, heads=16):
    spec = AttentionSpec(heads, 576, 64, sink=True)
    inputs = dict(ops.get("attention").inputs(spec, Case(AttentionSizes(3, 90), "ragged"), Draw(2, device)))
    inputs["sink"][0], inputs["sink"][1] = math.inf, -math.inf
    return spec, inputs


@pytest.mark.parametrize(("device", "heads"), ON_EVERY_DESIGN)
def test_sinks_may_be_infinite(device, heads):
    _, inputs = sink_inputs(device, heads)
    out, lse = dsa.sparse_attention(*list(inputs.values())[:4], sink=inputs["sink"])
    plain, plain_lse = dsa.sparse_attention(*list(inputs.values())[:4])
    assert_sinks_are_infinite(out, lse, plain, plain_lse)


@pytest.mark.parametrize(("device", "heads"), ON_EVERY_DESIGN)
@pytest.mark.parametrize("layout", ["v32", "v4"])
def test_sinks_of_a_cache_may_be_infinite(device, heads, layout):
    op = ops.get("attention_paged")
    spec = AttentionPagedSpec(heads, 64, layout, sink=True)
    inputs = op.inputs(spec, Case(AttentionPagedSizes(3, 1, 200), "ragged"), Draw(2, device))
    inputs["sink"][0], inputs["sink"][1] = math.inf, -math.inf
    given = [inputs[name] for name in ("q", "cache", "indices", "sm_scale")]
    out, lse = dsa.sparse_attention_paged(*given, sink=inputs["sink"])
    plain, plain_lse = dsa.sparse_attention_paged(*given)
    assert_sinks_are_infinite(*(each[:, 0] for each in (out, lse, plain, plain_lse)))


def assert_sinks_are_infinite(out, lse, plain, plain_lse):
    """Head 0's takes all weight, head 1's none; lse knows of neither."""
    assert not out[:, 0].any()
    torch.testing.assert_close(out[:, 1], plain[:, 1], rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-6, atol=1e-6)


def test_sinks_may_be_infinite_interpreted(interpreter):
    spec, inputs = sink_inputs("cpu")
    outputs = run_interpreted(interpreter, "attention", spec, SMALL, inputs)
    accuracy = ops.get("attention").check(spec, inputs, outputs, ops.get("attention").reference(spec, inputs))
    assert accuracy.passed, accuracy.detail


def near_zero(device):
    """16 queries whose lse, of scores up to 16 before 4 channels shift them, lies within 1e-5 of 0."""
    draw = Draw(3)
    q = draw.normal(16, 1, 576, dtype=torch.bfloat16, scale=4.0)
    kv = draw.normal(4096, 1, 576, dtype=torch.bfloat16)
    kv[:, 0, -4:], q[..., -4:] = 1.0, 0.0
    sm_scale = 576**-0.5
    for channel in range(-4, 0):
        lse = exact_lse(q, kv, sm_scale)
        q[:, 0, channel] = -lse / sm_scale
    indices = torch.arange(4096, dtype=torch.int32).expand(16, 1, 4096).contiguous()
    assert exact_lse(q, kv, sm_scale).abs().max() < 1e-5
    tensors = {"q": q.repeat(1, 16, 1), "kv": kv, "indices": indices}
    return {name: value.to(device) for name, value in tensors.items()} | {"sm_scale": sm_scale, "lengths": None, "sink": None}


def exact_lse(q, kv, sm_scale):
    return (q[:, 0].double() @ kv[:, 0].double().T * sm_scale).logsumexp(-1)


def assert_near_zero(lse, inputs):
    exact = exact_lse(inputs["q"].cpu(), inputs["kv"].cpu(), inputs["sm_scale"])[:, None]
    limit = compare.LSE
    assert ((lse.cpu().double() - exact).abs() <= limit.absolute + limit.relative * exact.abs()).all()


def test_lse_near_zero_is_within_its_tolerance(interpreter):
    inputs = near_zero("cpu")
    config = SMALL.replace(block_n=128)  # a quarter of the interpreter's steps
    assert_near_zero(run_interpreted(interpreter, "attention", AttentionSpec(16, 576, 4096), config, inputs)["lse"], inputs)


@pytest.mark.gpu
def test_lse_near_zero_is_within_its_tolerance_on_a_gpu():
    inputs = near_zero("cuda")
    assert_near_zero(dsa.sparse_attention(*list(inputs.values())[:4])[1], inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_traces_with_dynamic_shapes_give_the_same(device):
    def step(scores, ends):
        return dsa.select(scores, ends, 64) + 1

    traced = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, columns in ((3, 200), (5, 333), (2, 4096)):
        scores = Draw(rows, device).normal(rows, columns)
        ends = torch.full((rows,), columns, dtype=torch.int32, device=device)
        assert torch.equal(traced(scores, ends), step(scores, ends))


@pytest.mark.parametrize("device", DEVICES)
def test_traces_of_attention_with_dynamic_shapes_give_the_same(device):
    def step(q, kv, indices):
        return dsa.sparse_attention(q, kv, indices, 0.1)[0] + 1

    traced = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries, tokens in ((3, 200), (5, 333), (2, 70)):
        draw = Draw(queries, device)
        q, kv = (draw.normal(each, 16, 576, dtype=torch.bfloat16) for each in (queries, tokens))
        given = q, kv[:, :1].contiguous(), draw.integers(-1, tokens, queries, 1, 64)
        assert torch.equal(traced(*given), step(*given))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("next_n", [1, 2])
def test_a_rank_without_a_sequence_decodes_nothing(device, next_n):
    """Nor does one without a query prefill anything; what comes out has the shapes and types of any other step."""
    for call, inputs, rows in (
        (LAYER.decode, decode_inputs(TINY, 0, next_n, 200, device), (0, next_n)),
        (LAYER.prefill, prefill_inputs(TINY, 0, 150, device), (0,)),
    ):
        out, lse, chosen = call(**inputs)
        assert out.shape == (*rows, TINY.heads, 512) and out.dtype == torch.bfloat16
        assert lse.shape == (*rows, TINY.heads) and lse.dtype == torch.float32
        assert chosen.shape[:-1] == rows and chosen.dtype == torch.int32


@pytest.mark.gpu
def test_streams_and_threads_do_not_meet():
    inputs = [decode_inputs(TINY, batch, 1, 700, "cuda") for batch in (1, 3, 5, 8)]
    wanted = [LAYER.decode(**each) for each in inputs]
    torch.cuda.synchronize()

    def serve(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [LAYER.decode(**inputs[number]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(4) as threads:
        for number, results in enumerate(threads.map(serve, range(4))):
            for result in results:
                assert_same(wanted[number], result)


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = decode_inputs(TINY, 3, 1, 300, "cuda:1")
    on_first = {name: value.to("cuda:0") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    here, there = LAYER.decode(**on_first), LAYER.decode(**inputs)
    assert there.out.device.index == 1
    assert_same(here, [each.to("cuda:0") for each in there])


@pytest.mark.gpu
def test_a_replay_sees_other_lengths_pages_and_queries():
    """Two graphs of one memory pool, as engines capture a graph for each batch size."""
    batches = [decode_inputs(TINY, batch, 1, 900, "cuda") for batch in (4, 2)]
    for inputs in batches:
        LAYER.decode(**inputs)
    graphs, captured, pool = [], [], None
    for inputs in batches:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            captured.append(LAYER.decode(**inputs))
        pool = graphs[-1].pool()
    for turn in range(6):
        number = turn % 2
        inputs = batches[number]
        draw = Draw(turn, "cuda")
        inputs["lengths"].copy_(draw.integers(0, 901, *inputs["lengths"].shape))
        inputs["page_table"].copy_(inputs["page_table"].flip(0))
        inputs["q"].copy_(draw.normal(*inputs["q"].shape, dtype=torch.bfloat16))
        graphs[number].replay()
        replayed = [each.clone() for each in captured[number]]
        assert_same(LAYER.decode(**inputs), replayed)


@pytest.mark.gpu
def test_scores_lie_beyond_two_billion():
    """2200 rows of a million columns of bf16: 2.3 · 10^9 elements."""
    rows, columns = 2200, 1 << 20
    scores = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    scores.copy_(Draw(0, "cuda").normal(1, columns))
    scores[-1] = Draw(1, "cuda").normal(columns).bfloat16()
    ends = torch.full((rows,), columns, dtype=torch.int32, device="cuda")
    chosen = dsa.select(scores, ends, 2048)
    assert torch.equal(chosen[-1:], dsa.select(scores[-1:].clone(), ends[-1:].clone(), 2048))
    assert (chosen[:-1] == chosen[0]).all()
    order = scores[-1].sort(descending=True, stable=True).indices[:2048].sort().values
    assert torch.equal(chosen[-1], order.int())


@pytest.mark.gpu
def test_rows_lie_beyond_sixty_five_thousand():
    scores = torch.stack([Draw(row, "cuda").permutation(200) for row in range(100)]).float().repeat(700, 1)
    ends = torch.full((70000,), 200, dtype=torch.int32, device="cuda")
    assert torch.equal(dsa.select(scores, ends, 64), scores.topk(64).indices.sort().values.int())


@pytest.mark.gpu
def test_a_cache_lies_beyond_two_gigabytes():
    layout, blocks, far = KvV32Layout(), 70000, 69000  # 2.9 GB
    cache, draw = torch.zeros(blocks, *layout.shape_per_block, dtype=torch.uint8, device="cuda"), Draw(0, "cuda")
    near = layout.empty(40, "cuda")
    slots = torch.arange(40 * 64, device="cuda")
    nope, rope = (draw.normal(len(slots), width, dtype=torch.bfloat16) for width in (512, 64))
    dsa.store_kv(nope, rope, slots, near)
    dsa.store_kv(nope, rope, slots + far * 64, cache)
    assert torch.equal(cache[far : far + 40], near)
    assert torch.equal(dsa.gather_kv(cache, slots + far * 64), dsa.gather_kv(near, slots))
    q = draw.normal(2, 1, 128, 576, dtype=torch.bfloat16)
    indices = torch.stack([draw.permutation(len(slots))[:2048] for _ in range(2)])[:, None].int()
    assert_same(
        dsa.sparse_attention_paged(q, near, indices, 0.04), dsa.sparse_attention_paged(q, cache, indices + far * 64, 0.04)
    )


@pytest.mark.gpu
def test_pages_of_bf16_lie_beyond_two_billion_elements():
    """70000 blocks of 64 rows: 2.6 · 10^9 elements, of which the last are attended to, by few rows and by a prompt's many."""
    blocks, far, draw = 70000, 69000, Draw(0, "cuda")
    cache = torch.zeros(blocks, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    cache[far : far + 40] = near = draw.normal(40, 64, 1, 576, dtype=torch.bfloat16, scale=0.1)
    for rows in (2, 300):
        q = draw.normal(rows, 1, 128, 576, dtype=torch.bfloat16)
        indices = torch.stack([draw.permutation(40 * 64)[:2048] for _ in range(rows)])[:, None].int()
        there = dsa.sparse_attention_paged(q, cache, indices + far * 64, 0.04, layout="bf16")
        assert_same(there, dsa.sparse_attention_paged(q, near, indices, 0.04, layout="bf16"))


@pytest.mark.gpu
def test_queries_times_heads_lie_beyond_two_billion():
    """35000 queries of 128 heads: 2.6 · 10^9 elements of q, 2.3 · 10^9 of out."""
    queries, draw = 35000, Draw(0, "cuda")
    q = torch.zeros(queries, 128, 576, dtype=torch.bfloat16, device="cuda")
    q[-8:] = draw.normal(8, 128, 576, dtype=torch.bfloat16)
    kv = draw.normal(500, 1, 576, dtype=torch.bfloat16, scale=0.1)
    indices = draw.integers(0, 500, queries, 1, 64)
    out, lse = dsa.sparse_attention(q, kv, indices, 0.04)
    few = dsa.sparse_attention(q[-8:].clone(), kv, indices[-8:].clone(), 0.04)
    for name, value, wanted, limit in (("out", out, few[0], compare.ATTENTION), ("lse", lse, few[1], compare.LSE)):
        result = compare.close(name, value[-8:], wanted, limit)
        assert result.passed, result.detail
