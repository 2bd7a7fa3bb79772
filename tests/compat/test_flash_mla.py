"""The FlashMLA drop-in: every argument, as its documentation has it, against attention in fp64 over the latents read back."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_codegen.compat import flash_mla
from dsa_codegen.errors import InputError
from dsa_codegen.problem.compare import ATTENTION, LSE, close
from dsa_codegen.problem.kv_layouts import kv_layout
from dsa_codegen.problem.quantization import quantize_groups

INF = math.inf
LAYOUTS = {576: "v32", 512: "v4"}
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def attend(q, latent, valid, scale, sink=None):
    """(out, highest scores, lse) of q [..., heads, d] over latent [..., entries, d], as FlashMLA defines them."""
    scores = (q.double() @ latent.double().transpose(-1, -2) * scale).masked_fill(~valid[..., None, :], -INF)
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double().expand_as(lse))
    weights = (scores - total[..., None]).exp().masked_fill(~valid[..., None, :], 0.0)
    return weights @ latent[..., :512].double(), scores.amax(-1), lse.masked_fill(lse == -INF, INF)


def assert_close(out, lse, expected, max_logits=None):
    results = [close("out", out, expected[0], ATTENTION), close("lse", lse, expected[2], LSE)]
    if max_logits is not None:
        results.append(close("max_logits", max_logits, expected[1], LSE))
    assert all(result.passed for result in results), [result.detail for result in results]


def some_sinks(heads, generator):
    """Logits of which every third is +inf and every third -inf."""
    sink = torch.randn(heads, generator=generator)
    sink[::3], sink[1::3] = INF, -INF
    return sink


def cache_of(d, page, blocks, generator, device):
    """(a cache as engines view it, bf16 latents of its slots)."""
    return filled(kv_layout(LAYOUTS[d], page), blocks, generator, device)


def filled(layout, blocks, generator, device):
    page, pages = layout.page, layout.empty(blocks, device)
    nope = torch.randn(blocks * page, layout.d_nope, generator=generator).to(device) / 10
    rope = torch.randn(blocks * page, layout.d_rope, generator=generator).to(device) / 10
    slots = torch.arange(blocks * page, device=device)
    layout.pack(pages, slots, *quantize_groups(nope, layout.group, power_of_two=True), rope)
    row = layout.bytes_per_token
    view = pages.as_strided((blocks, page, 1, row), (pages.stride(0), row, row, 1))
    return view, layout.dequantize(pages, slots).bfloat16()


def lists(rows, topk, slots, generator, device):
    """int32 [*rows, topk], every fifth entry -1, at random places."""
    listed = torch.randint(slots, (*rows, topk), generator=generator, dtype=torch.int32)
    return listed.masked_fill(torch.rand(*rows, topk, generator=generator) < 0.2, -1).to(device)


def read(latent, listed, length=None):
    """(latents, which of them count) of lists [batch, s_q, topk] with lengths [batch]."""
    valid = (listed >= 0) & (listed < len(latent))
    if length is not None:
        valid &= torch.arange(listed.shape[-1], device=listed.device) < length[:, None, None]
    return latent[listed.clamp(0, len(latent) - 1).long()], valid


def decode(q, cache, listed, **options):
    metadata, _ = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(q, cache, None, None, 512, metadata, is_fp8_kvcache=True, indices=listed, **options)


@DEVICES
@pytest.mark.parametrize("d", [576, 512])
@pytest.mark.parametrize(
    ("page", "heads", "s_q"), [(2, 64, 1), (53, 128, 3), (61, 1, 2), (64, 16, 1), (69, 8, 3), (256, 100, 2), (576, 5, 1)]
)
def test_decode_with_every_page_size(device, d, page, heads, s_q):
    g = torch.Generator().manual_seed(page + d)
    cache, latent = cache_of(d, page, 3, g, device)
    q = torch.randn(3, s_q, heads, d, generator=g).bfloat16().to(device)
    listed = lists((3, s_q), 40, len(latent), g, device)
    length = torch.tensor([0, 13, 40], dtype=torch.int32, device=device)
    sink = some_sinks(heads, g).to(device)
    out, lse = decode(q, cache.view(torch.float8_e4m3fn), listed, topk_length=length, attn_sink=sink, softmax_scale=0.03)
    assert (out.shape, lse.shape) == ((3, s_q, heads, 512), (3, heads, s_q))
    assert_close(out, lse.transpose(1, 2), attend(q, *read(latent, listed, length), 0.03, sink))
    assert (lse[0] == INF).all() and not out[0].any()  # length 0: the lonely query
    assert not out[:, :, ::3].any()  # a sink of +inf takes all the weight


@DEVICES
@pytest.mark.parametrize(("kv_format", "name"), [(None, "v41"), ("V41", "v41"), ("V32_NO_ROPE", "fp8_fp32_128")])
def test_decode_of_rows_of_528_bytes(device, kv_format, name):
    """All 512 channels in FP8: DeepSeek-V4.1, or V3.2 without rotary channels, whose format must be named."""
    g = torch.Generator().manual_seed(528)
    pools = [filled(kv_layout(name, 33, 512, 0), blocks, g, device) for blocks in (3, 2)]
    q = torch.randn(2, 2, 16, 512, generator=g).bfloat16().to(device)
    listed = [lists((2, 2), 40, len(latent), g, device) for _, latent in pools]
    more = {"extra_k_cache": pools[1][0], "extra_indices_in_kvcache": listed[1]}
    out, lse = decode(q, pools[0][0], listed[0], kv_format=kv_format, **more)
    found = [read(latent, each) for (_, latent), each in zip(pools, listed, strict=True)]
    latents, valid = (torch.cat(each, 2) for each in zip(*found, strict=True))
    assert_close(out, lse.transpose(1, 2), attend(q, latents, valid, 512**-0.5))


@DEVICES
@pytest.mark.parametrize("d", [512, 576])
@pytest.mark.parametrize(("page", "extra_page", "topk", "extra_topk"), [(256, 64, 16, 37), (256, 2, 16, 64), (61, 69, 30, 7)])
@pytest.mark.parametrize("lengths", [False, True])
def test_decode_over_two_pools(device, d, page, extra_page, topk, extra_topk, lengths):
    g = torch.Generator().manual_seed(page + extra_page)
    (cache, latent), (more, more_latent) = (cache_of(d, each, 2, g, device) for each in (page, extra_page))
    q = torch.randn(4, 2, 16, d, generator=g).bfloat16().to(device)
    listed, further = (lists((4, 2), k, len(each), g, device) for k, each in ((topk, latent), (extra_topk, more_latent)))
    further[3] = -1
    length, further_length = (torch.tensor([0, k // 2, 0, k], dtype=torch.int32, device=device) for k in (topk, extra_topk))
    further_length[0] = 5  # nothing in the first pool, something in the second; sequence 2 has nothing at all
    sink = some_sinks(16, g).to(device)
    options = {"topk_length": length, "extra_topk_length": further_length} if lengths else {}
    pools = [read(latent, listed, length if lengths else None), read(more_latent, further, further_length if lengths else None)]
    both, valid = torch.cat([pool for pool, _ in pools], 2), torch.cat([kept for _, kept in pools], 2)
    out, lse = decode(q, cache, listed, attn_sink=sink, extra_k_cache=more, extra_indices_in_kvcache=further, **options)
    assert_close(out, lse.transpose(1, 2), attend(q, both, valid, d**-0.5, sink))
    if lengths:
        assert (lse[2] == INF).all() and (lse[0] < INF).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_decode_takes_every_dtype(dtype, wide):
    g = torch.Generator().manual_seed(1)
    cache, latent = cache_of(576, 64, 2, g, "cpu")
    q = torch.randn(2, 1, 4, 576, generator=g).bfloat16()
    listed = lists((2, 1), 20, len(latent), g, "cpu")
    out, lse = decode(q, cache.view(dtype), listed.to(wide))
    assert_close(out, lse.transpose(1, 2), attend(q, *read(latent, listed), 576**-0.5))


def test_indices_beyond_int32_name_no_token():
    g = torch.Generator().manual_seed(2)
    cache, latent = cache_of(576, 64, 2, g, "cpu")
    q = torch.randn(1, 1, 4, 576, generator=g).bfloat16()
    listed = lists((1, 1), 20, len(latent), g, "cpu").long()
    far = listed.clone()
    far[..., :4] = torch.tensor([2**32 + 3, -(2**32) + 3, 2**31, -(2**40)])
    listed[..., :4] = -1
    assert all(torch.equal(a, b) for a, b in zip(decode(q, cache, far), decode(q, cache, listed), strict=True))


def test_metadata_is_reused_for_any_shape_and_holds_what_is_assigned():
    metadata, nothing = flash_mla.get_mla_metadata(torch.zeros(3), 128, 1, topk=2048)
    assert nothing is None
    metadata.tile_scheduler_metadata, metadata.num_splits = flash_mla.get_mla_decoding_metadata(torch.zeros(3).int(), 128, 1)
    assert (metadata.tile_scheduler_metadata.shape, metadata.num_splits.shape) == ((1, 8), (4,))
    g = torch.Generator().manual_seed(3)
    cache, latent = cache_of(512, 64, 1, g, "cpu")
    for batch, kv_format in ((1, None), (3, "V4")):
        q, listed = torch.randn(batch, 1, 2, 512, generator=g).bfloat16(), lists((batch, 1), 9, len(latent), g, "cpu")
        out, _ = flash_mla.flash_mla_with_kvcache(
            q, cache, None, None, 512, metadata, num_splits=metadata.num_splits, indices=listed, kv_format=kv_format
        )
        assert out.shape == (batch, 1, 2, 512)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("indices", None),
        ("head_dim_v", 576),
        ("causal", True),
        ("is_fp8_kvcache", False),
        ("enable_batch_invariant", "sometimes"),
        ("kv_format", "V32_NO_ROPE"),
        ("kv_format", "V4"),
        ("descale_q", torch.ones(1)),
        ("extra_indices", torch.zeros(1, 1, 4, dtype=torch.int32)),
    ],
)
def test_decode_refuses_what_is_not_served(argument, value):
    named = {"extra_indices": "extra_indices_in_kvcache"}.get(argument, argument)
    arguments = {
        **{"q": torch.zeros(1, 1, 4, 576).bfloat16(), "k_cache": torch.zeros(1, 64, 1, 656).byte(), "block_table": None},
        **{"cache_seqlens": None, "head_dim_v": 512, "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta()},
        **{"indices": torch.zeros(1, 1, 4, dtype=torch.int32), named: value},
    }
    with pytest.raises(InputError, match=f"^{argument}:"):
        flash_mla.flash_mla_with_kvcache(**arguments)


def prefill_inputs(heads, d, device, queries=6, tokens=50, topk=24):
    g = torch.Generator().manual_seed(heads + d)
    q = torch.randn(queries, heads, d, generator=g).bfloat16().to(device)
    kv = (torch.randn(tokens, 1, d, generator=g) / 10).bfloat16().to(device)
    listed = torch.randint(-3, tokens + 4, (queries, 1, topk), generator=g, dtype=torch.int32).to(device)
    listed[2] = -1
    return q, kv, listed, some_sinks(heads, g).to(device)


def read_flat(kv, listed, length=None):
    valid = (listed[:, 0] >= 0) & (listed[:, 0] < len(kv))
    if length is not None:
        valid &= torch.arange(listed.shape[-1], device=kv.device) < length[:, None]
    return kv[listed[:, 0].clamp(0, len(kv) - 1).long(), 0], valid


OPTIONS = [(), ("sink",), ("lengths",), ("sink", "lengths")]
PREFILL = [(d, heads, options) for d in (576, 512) for heads in (1, 8, 17, 64, 128) for options in OPTIONS]
# Each is a kernel that takes 15 s to compile: on a GPU every width of heads and rows, and each option more than once.
ON_GPU = [
    pytest.param("cuda", *each, marks=pytest.mark.gpu) for place, each in enumerate(PREFILL) if place // 4 % 4 == place % 4
]


@pytest.mark.parametrize(("device", "d", "heads", "options"), [*(("cpu", *each) for each in PREFILL), *ON_GPU])
def test_prefill(device, d, heads, options):
    q, kv, listed, sink = prefill_inputs(heads, d, device)
    sink = sink if "sink" in options else None
    length = torch.tensor([24, 1, 9, 0, 30, 17], dtype=torch.int32, device=device) if "lengths" in options else None
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04, attn_sink=sink, topk_length=length)
    assert_close(out, lse, attend(q, *read_flat(kv, listed, length), 0.04, sink), max_logits)
    assert (lse[2] == INF).all() and (max_logits[2] == -INF).all() and not out[2].any()


@DEVICES
def test_prefill_statistics_in_base_2_or_none(device):
    q, kv, listed, _ = prefill_inputs(8, 576, device)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04)
    same, highest, base_2 = flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04, use_legacy=True, return_log2_lse=True)
    alone, *nothing = flash_mla.flash_mla_sparse_fwd(q, kv, listed.long(), 0.04, 512, return_log2_lse=False)
    assert nothing == [None, None]
    assert torch.equal(same, out)
    assert torch.equal(alone, out)
    torch.testing.assert_close(base_2, lse / math.log(2))
    torch.testing.assert_close(highest, max_logits / math.log(2))


@DEVICES
def test_results_are_written_where_the_caller_says(device):
    q, kv, listed, _ = prefill_inputs(8, 576, device)
    expected, _, _ = flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04)
    whole = torch.full((6, 16, 512), math.nan, dtype=torch.bfloat16, device=device)
    for buffer in (torch.full_like(expected, math.nan), whole[:, :8]):  # a slice of more heads, as vLLM has it
        out, _, _ = flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04, out=buffer)
        assert out is buffer
        assert torch.equal(buffer, expected)
    assert whole[:, 8:].isnan().all()


@DEVICES
def test_decode_writes_where_the_caller_says(device):
    g = torch.Generator().manual_seed(5)
    cache, latent = cache_of(512, 64, 2, g, device)
    q = torch.randn(3, 1, 4, 512, generator=g).bfloat16().to(device)
    listed = lists((3, 1), 20, len(latent), g, device)
    expected, _ = decode(q, cache, listed)
    buffer = torch.full((3, 4, 512), math.nan, dtype=torch.bfloat16, device=device)
    decode(q, cache, listed, out=buffer.unsqueeze(1))
    assert torch.equal(buffer.unsqueeze(1), expected)


def test_prefill_refuses_another_value_width():
    q, kv, listed, _ = prefill_inputs(4, 576, "cpu")
    with pytest.raises(InputError, match=r"^d_v:"):
        flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04, d_v=576)


def test_torch_compile_traces_the_drop_ins():
    q, kv, listed, _ = prefill_inputs(4, 576, "cpu")
    traced = torch.compile(flash_mla.flash_mla_sparse_fwd, fullgraph=True, backend="aot_eager")
    expected = flash_mla.flash_mla_sparse_fwd(q, kv, listed, 0.04)
    assert all(torch.equal(a, b) for a, b in zip(traced(q, kv, listed, 0.04), expected, strict=True))
