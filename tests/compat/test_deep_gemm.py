"""The DeepGEMM drop-in: every argument, as its documentation has it, against logits in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen.compat import deep_gemm
from dsa_codegen.errors import InputError
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.compare import LOGITS, close

INF = math.inf
FP8 = torch.float8_e4m3fn
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def score(q, key, weights):
    """fp64 [queries, tokens] of q [queries, heads, d], dequantised keys [tokens, d] and weights [queries, heads]."""
    return ((q.double() @ key.double().T).relu() * weights[..., None].double()).sum(1)


def flat(device, heads=64, d=128, queries=9, tokens=70):
    g = torch.Generator().manual_seed(heads)
    q = torch.randn(queries, heads, d, generator=g).to(FP8).to(device)
    key, scale = torch.randn(tokens, d, generator=g).to(FP8).to(device), torch.rand(tokens, generator=g).to(device)
    weights = (torch.randn(queries, heads, generator=g) / 100).to(device)
    starts = torch.randint(0, 30, (queries,), generator=g, dtype=torch.int32).to(device)
    ends = (starts.cpu() + torch.randint(0, 41, (queries,), generator=g, dtype=torch.int32)).to(device)
    expected = score(q, key.float() * scale[:, None], weights)
    column = torch.arange(tokens, device=device)
    inside = (column >= starts[:, None]) & (column < ends[:, None])
    return q, (key, scale), weights, starts, ends, expected.masked_fill(~inside, -INF)


def assert_close(logits, expected):
    """Inside the windows; outside of them ``expected`` is -inf."""
    result = close("logits", logits.masked_fill(expected.isneginf(), -INF), expected, LOGITS)
    assert result.passed, result.detail


@DEVICES
@pytest.mark.parametrize(("heads", "d"), [(8, 128), (16, 64), (32, 32), (64, 128)])
def test_prefill_logits(device, heads, d):
    *arguments, expected = flat(device, heads, d)
    logits = deep_gemm.fp8_mqa_logits(*arguments)
    assert (logits.shape, logits.dtype) == (expected.shape, torch.float32)
    assert torch.equal(logits.isneginf(), expected.isneginf())  # cleaned, as by default
    assert_close(logits, expected)
    assert_close(deep_gemm.fp8_mqa_logits(*arguments, clean_logits=False), expected)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_logits_of_either_dtype(device, dtype):
    q, *rest, expected = flat(device)
    logits = deep_gemm.fp8_fp4_mqa_logits((q, None), *rest, clean_logits=True, max_seqlen_k=0, logits_dtype=dtype)
    assert logits.dtype is dtype
    assert_close(logits, expected)


@DEVICES
@pytest.mark.parametrize("spelling", [{"clean_logits": False, "max_seqlen_k": 45}, {"max_seqlen_k": 45}, {"clean_logits": 45}])
def test_compressed_rows_begin_with_their_window(device, spelling):
    q, *rest, expected = flat(device)
    logits = deep_gemm.fp8_fp4_mqa_logits((q, None), *rest, **spelling)
    assert logits.shape == (9, 45)
    starts, ends = rest[2:]
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        assert_close(logits[row, : end - start], expected[row, start:end])


def test_compressed_rows_are_not_cleaned():
    *arguments, _ = flat("cpu")
    with pytest.raises(InputError, match=r"^clean_logits:"):
        deep_gemm.fp8_mqa_logits(*arguments, True, 45)


def paged(device, next_n=2, page=64, heads=32, batch=3, context=150):
    """(arguments without metadata, expected logits with -inf beyond the lengths)."""
    g = torch.Generator().manual_seed(next_n)
    layout, pages = IndexKLayout(page, 128), -(-context // page)
    cache = layout.empty(batch * pages + 1, device)
    key, scale = torch.randn(len(cache) * page, 128, generator=g).to(FP8).to(device), torch.rand(len(cache) * page, generator=g)
    layout.pack(cache, torch.arange(len(key), device=device), key, scale.to(device))
    table = torch.randperm(batch * pages, generator=g).view(batch, pages).int().to(device)
    q = torch.randn(batch, next_n, heads, 128, generator=g).to(FP8).to(device)
    weights = (torch.randn(batch * next_n, heads, generator=g) / 100).to(device)
    lengths = torch.randint(0, context + 1, (batch, next_n), generator=g, dtype=torch.int32).to(device)
    expected = torch.full((batch * next_n, context), -INF, dtype=torch.float64, device=device)
    for row in range(batch * next_n):
        token = torch.arange(int(lengths.view(-1)[row]), device=device)
        slots = table[row // next_n, token // page] * page + token % page
        row_q = q.flatten(0, 1)[row : row + 1]
        expected[row, : len(token)] = score(row_q, layout.dequantize(cache, slots), weights[row : row + 1])[0]
    return (q, cache, weights, lengths, table), expected


@DEVICES
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("clean", [False, True])
def test_decode_logits(device, next_n, clean):
    arguments, expected = paged(device, next_n)
    metadata = deep_gemm.get_paged_mqa_logits_metadata(arguments[3], 64, deep_gemm.get_num_sms())
    logits = deep_gemm.fp8_paged_mqa_logits(*arguments, metadata, 150, clean_logits=clean)
    assert (logits.shape, logits.dtype) == ((3 * next_n, 150), torch.float32)
    assert_close(logits, expected)
    if clean:
        assert torch.equal(logits.isneginf(), expected.isneginf())


@DEVICES
@pytest.mark.parametrize("page", [32, 64, 128])
def test_decode_logits_in_bf16_of_any_page(device, page):
    (q, *rest), expected = paged(device, page=page)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits((q, None), *rest, None, 150, False, logits_dtype=torch.bfloat16)
    assert logits.dtype is torch.bfloat16
    assert_close(logits, expected)


@DEVICES
def test_rows_of_one_sequence(device):
    """Several tokens of a sequence as rows of their own: ``indices`` says which belong together, and changes nothing."""
    (q, cache, weights, lengths, table), expected = paged(device, 2)
    rows = q.flatten(0, 1)[:, None], cache, weights, lengths.view(-1, 1), table.repeat_interleave(2, 0)
    indices = torch.arange(3, dtype=torch.int32, device=device).repeat_interleave(2)
    metadata = deep_gemm.get_paged_mqa_logits_metadata(lengths.view(-1, 1), 64, 132, indices=indices)
    assert_close(deep_gemm.fp8_paged_mqa_logits(*rows, metadata, 150, indices=indices), expected)


@DEVICES
def test_lengths_in_one_dimension(device):
    (q, cache, weights, lengths, table), expected = paged(device, 1)
    assert_close(deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lengths[:, 0], table, None, 150), expected)


def test_lengths_in_one_dimension_do_not_say_what_each_of_several_queries_sees():
    (q, cache, weights, lengths, table), _ = paged("cpu", 2)
    with pytest.raises(InputError, match=r"^lengths:"):
        deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lengths[:, 0], table, None, 150)


def test_metadata_has_the_shape_that_engines_copy():
    metadata = deep_gemm.get_paged_mqa_logits_metadata(torch.zeros(3, 2, dtype=torch.int32), 64, num_sms=132)
    assert (metadata.shape, metadata.dtype) == ((133, 2), torch.int32)
    assert deep_gemm.get_num_sms() >= 1


def test_fp4_is_refused():
    (q, *rest), _ = paged("cpu", 1)
    scale = torch.zeros(3, 1, 32, dtype=torch.int32)
    with pytest.raises(InputError, match=r"^q: got a pair with scales"):
        deep_gemm.fp8_fp4_paged_mqa_logits((q, scale), *rest, None, 150)
    with pytest.raises(InputError, match=r"^logits_dtype:"):
        deep_gemm.fp8_fp4_paged_mqa_logits((q, None), *rest, None, 150, logits_dtype=torch.float16)
