"""Stand-ins with the signatures that other libraries' operators have, computed by this package's functions."""

from __future__ import annotations

import torch

from dsa_codegen import functions
from dsa_codegen.bench.peers import flashmla


def fast_topk(score, indices, lengths, row_starts):
    for row, (values, length) in enumerate(zip(score, lengths.tolist(), strict=True)):
        start = int(row_starts[row]) if row_starts is not None else 0
        best = values[start : start + length].topk(min(length, indices.shape[1]), sorted=False).indices
        indices[row] = -1
        indices[row, : len(best)] = best.int().flip(0)


def fast_topk_slots(score, lengths, dst_page_table, src_page_table, cu_seqlens_q, row_starts):
    assert cu_seqlens_q.tolist() == list(range(len(score) + 1))
    fast_topk(score, dst_page_table, lengths, row_starts)
    chosen = src_page_table.gather(1, dst_page_table.clamp(min=0).long())
    dst_page_table.copy_(torch.where(dst_page_table < 0, -1, chosen))


def sparse_prefill(q, kv, indices, sm_scale, d_v, sink=None):
    assert q.shape[1] in flashmla.HEADS and q.stride(-1) == 1 and d_v == 512 and indices.shape[2] % 128 == 0
    out, lse = functions.sparse_attention(q, kv, indices, sm_scale, sink=sink)
    return [out, lse, lse]


def metadata(seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk):
    assert is_fp8_kvcache and h_k == 1 and num_q_tokens_per_head_k % h_q == 0 and topk
    return [seqlens_k.new_zeros(4, 8), seqlens_k.new_zeros(len(seqlens_k) + 1)]


def decode(q, cache, d_v, seqlens, table, scale, causal, tiles, splits, is_fp8, indices, sink=None):
    assert is_fp8 and not causal and len(seqlens) == len(table) == len(q) and len(splits) == len(q) + 1
    assert q.shape[2] in flashmla.HEADS and indices.shape[2] % 64 == 0
    assert cache.shape[2] == 1 and cache.stride(1) == cache.shape[3] == {576: 656, 512: 584}[q.shape[3]]
    if q.shape[3] == 512:  # our functions take a v4 cache as padded pages
        cache = cache.as_strided((len(cache), cache.stride(0)), (cache.stride(0), 1))
    out, lse = functions.sparse_attention_paged(q, cache, indices, scale, sink=sink)
    return [out, lse.transpose(1, 2).contiguous()]


def legacy_decode(q, kv, indices, length, sink, tiles, splits, extra, extra_indices, extra_length, d_v, sm_scale, layout):
    assert (tiles is None) == (splits is None) and (length, extra_length) == (None,) * 2
    assert layout == {576: "V32", 512: "V4"}[q.shape[3]]
    if tiles is None:
        tiles, splits = q.new_zeros(4, 8, dtype=torch.int32), q.new_zeros(len(q) + 1, dtype=torch.int32)
    lengths = q.new_zeros(len(q), dtype=torch.int32)
    if extra is not None:
        pools = ((kv, indices), (extra, extra_indices))
        assert all(cache.shape[3] == 584 and slots.shape[2] % 64 == 0 for cache, slots in pools)
        kv, extra = (cache.as_strided((len(cache), cache.stride(0)), (cache.stride(0), 1)) for cache in (kv, extra))
        second = {"extra_cache": extra, "extra_indices": extra_indices, "sink": sink}
        return *functions.sparse_attention_paged(q, kv, indices, sm_scale, **second), tiles, splits
    out, lse = decode(q, kv, d_v, lengths, lengths[:, None], sm_scale, False, tiles, splits, True, indices, sink)
    return out, lse, tiles, splits


def vllm_topk(logits, lengths, output, workspace, k, max_seq_len):
    assert workspace.numel() == 1 << 20 and output.shape == (len(logits), k) and max_seq_len == logits.shape[1]
    fast_topk(logits, output, lengths, None)


def fa3(q, k, v, k_new, v_new, q_v, out, cu_q, *rest):
    used, longest_q, longest_k, pages = rest[3], rest[4], rest[5], rest[6]
    sm_scale, causal, left, right, softcap = rest[15:20]
    assert k_new is v_new is out is None and cu_q.tolist() == list(range(len(q) + 1)) and set(used.tolist()) == {pages.shape[1]}
    assert (longest_q, longest_k, causal, left, right, softcap) == (1, pages.shape[1], True, -1, -1, 0.0)
    assert rest[26:28] == (1, 0)
    if q_v is None:  # keys as wide as they are, values the first of them
        return list(functions.sparse_attention(q, k[:, 0], pages[:, None], sm_scale, d_v=v.shape[-1]))
    assert k.shape[1:] == (1, 1, 64) and v.shape[1:] == (1, 1, 512)
    kv = torch.cat([v, k], -1)[:, 0]
    out, lse = functions.sparse_attention(torch.cat([q_v, q], -1), kv, pages[:, None], sm_scale)
    return [out, lse]


def plan(lengths):
    return lengths.new_zeros(len(lengths) + 1, 2)


def topk_v2_paged(scores, seq_lens, page_tables, out_page_indices, page_size, metadata, out_raw_indices=None):
    assert scores.stride(0) % 4 == 0 and metadata.shape == (len(scores) + 1, 2) and page_size & (page_size - 1) == 0
    fast_topk(scores, out_page_indices, seq_lens, None)
    if page_tables is not None:
        tokens = out_page_indices.clamp(min=0)
        slots = page_tables.gather(1, (tokens // page_size).long()) * page_size + tokens % page_size
        out_page_indices.copy_(torch.where(out_page_indices < 0, -1, slots))


def topk_v2_ragged(scores, seq_lens, *, out_offsets, out_indices, row_starts=None):
    assert seq_lens.dtype == out_offsets.dtype == out_indices.dtype == torch.int32 and scores.stride(0) % 4 == 0
    fast_topk(scores, out_indices, seq_lens, row_starts)
    out_indices.copy_(torch.where(out_indices < 0, -1, out_indices + out_offsets[:, None]))


def triton_mla(q, kv, indices, sm_scale, d_v=512, *, topk_length=None, out=None, union=0):
    assert union in (0, 2, 4) and topk_length.shape == q.shape[:1] and (not union or len(q) % union == 0)
    return functions.sparse_attention(q, kv, indices, sm_scale)[0]


def q8kv8(q, kv, indices, sm_scale, q_scale, kv_scale, d_v=512):
    assert q.dtype == kv.dtype == torch.float8_e4m3fn and q_scale.shape == kv_scale.shape == (1,) and q.shape[1] % 64 == 0
    out, lse = functions.sparse_attention(
        (q.float() * q_scale).bfloat16(), (kv.float() * kv_scale).bfloat16(), indices, sm_scale
    )
    return out, lse, lse


def cudnn_indexer(q, k, w, ratio=4, q_causal_offsets=None, precision="bf16", q_scale=None, k_scale=None):
    assert ratio == 1 and precision == "fp8" and q_scale.shape == w.shape and q_causal_offsets.dtype == torch.int32
    queries, context = q.shape[1], k.shape[1]
    ends = torch.arange(1, queries + 1, dtype=torch.int32) + q_causal_offsets
    logits = functions.indexer_logits(q[0], k[0, :, 0], k_scale[0, :, 0], w[0], torch.zeros_like(ends), ends)
    return {"scores": logits[None, :, :context]}


class CudnnTopk:
    """cuDNN-frontend's plan of a top-k."""

    def __init__(self, sample_input_values, sample_seq_lens, top_k, return_val, deterministic):
        assert not return_val and deterministic
        self.topk, self.ready = top_k, 0

    def check_support(self):
        self.ready += 1
        return True

    def compile(self):
        self.ready += 1

    def scratch_workspace_bytes(self):
        return 64

    def execute(self, input_values, seq_lens, *, out_indices, workspace):
        assert self.ready == 2 and workspace.numel() == 64
        fast_topk(input_values, out_indices, seq_lens, None)
        return out_indices, None


class Mla:
    """FlashInfer's paged MLA in plain operations: a page is a token."""

    def __init__(self, workspace, backend):
        assert workspace.dtype == torch.int8 and backend == "auto"

    def plan(self, qo, kv, pages, lengths, heads, d_v, d_rope, page, causal, sm_scale, q_dtype, kv_dtype):
        assert page == 1 and not causal and q_dtype == kv_dtype == torch.bfloat16
        assert qo.tolist() == list(range(len(lengths) + 1)) and kv[-1] == len(pages) and qo.dtype == kv.dtype == torch.int32
        self.pages, self.lengths, self.sm_scale, self.shape = pages, lengths, sm_scale, (heads, d_v, d_rope)

    def run(self, q_nope, q_rope, kv_nope, kv_rope, return_lse):
        assert not return_lse and (*q_nope.shape[1:], q_rope.shape[2]) == self.shape
        chosen = self.pages.view(len(self.lengths), 1, -1)
        kv = torch.cat([kv_nope, kv_rope], -1)
        return functions.sparse_attention(torch.cat([q_nope, q_rope], -1), kv, chosen, self.sm_scale)[0]
