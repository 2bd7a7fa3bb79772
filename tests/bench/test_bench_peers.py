"""The adapters, with stand-ins that have the libraries' own signatures: arguments, layouts and results are as each expects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsa_codegen import functions
from dsa_codegen.bench import peers
from dsa_codegen.bench.cases import case
from dsa_codegen.bench.peers import chain, deep_gemm, dense, fast_topk, flashinfer, flashmla, libraries, torch_topk, unfused
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.problem.draw import Draw

_INDEX = {"heads": 32, "head_dim": 64}
_PAGED = {"batch": 2, "next_n": 1, "context": 192, "page": 64}
INDEXER = case("indexer_prefill", "causal", {"queries": 8, "context": 96, **_INDEX})
INDEXER_DECODE = case("indexer_decode", "full", {**_PAGED, **_INDEX})
INDEXER_MTP = case("indexer_decode", "full", {**_PAGED, "next_n": 3, **_INDEX})
SELECT = case("select", "normal", {"rows": 3, "context": 2500, "k": 2048})
ATTENTION = case("attention_prefill", "random", {"queries": 3, "context": 200, "heads": 8, "head_dim": 576, "k": 128})
ATTENTION_512 = case("attention_prefill", "random", {"queries": 3, "context": 200, "heads": 64, "head_dim": 512, "k": 128})
ATTENTION_DECODE = case("attention_decode", "random", {**_PAGED, "heads": 64, "head_dim": 576, "k": 64})
ATTENTION_DECODE_V4 = case("attention_decode", "random", {**_PAGED, "next_n": 2, "heads": 16, "head_dim": 512, "k": 64})
CHOICE = case("index_select_prefill", "causal", {"queries": 4, "context": 2100, "k": 2048, **_INDEX})
CHOICE_DECODE = case("index_select_decode", "full", {**_PAGED, "context": 2112, "k": 2048, **_INDEX})
LAYER = case("layer_prefill", "real", {"queries": 2, "context": 2100, "heads": 64, "head_dim": 576, "k": 2048})
LAYER_DECODE = case("layer_decode", "real", {**_PAGED, "context": 2112, "heads": 64, "head_dim": 576, "k": 2048})


def _fast_topk(score, indices, lengths, row_starts):
    for row, (values, length) in enumerate(zip(score, lengths.tolist(), strict=True)):
        start = int(row_starts[row]) if row_starts is not None else 0
        best = values[start : start + length].topk(min(length, indices.shape[1]), sorted=False).indices
        indices[row] = -1
        indices[row, : len(best)] = best.int().flip(0)


def _fast_topk_slots(score, lengths, dst_page_table, src_page_table, cu_seqlens_q, row_starts):
    assert cu_seqlens_q.tolist() == list(range(len(score) + 1))
    _fast_topk(score, dst_page_table, lengths, row_starts)
    chosen = src_page_table.gather(1, dst_page_table.clamp(min=0).long())
    dst_page_table.copy_(torch.where(dst_page_table < 0, -1, chosen))


def _sparse_prefill(q, kv, indices, sm_scale, d_v):
    assert q.shape[1] in flashmla.HEADS and q.stride(-1) == 1 and d_v == 512 and indices.shape[2] % 128 == 0
    out, lse = functions.sparse_attention(q, kv, indices, sm_scale)
    return [out, lse, lse]


def _metadata(seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk):
    assert is_fp8_kvcache and h_k == 1 and num_q_tokens_per_head_k % h_q == 0 and topk
    return [seqlens_k.new_zeros(4, 8), seqlens_k.new_zeros(len(seqlens_k) + 1)]


def _decode(q, cache, d_v, seqlens, table, scale, causal, tiles, splits, is_fp8, indices):
    assert is_fp8 and not causal and len(seqlens) == len(table) == len(q) and len(splits) == len(q) + 1
    assert q.shape[2] in flashmla.HEADS and indices.shape[2] % 64 == 0
    assert cache.shape[2] == 1 and cache.stride(1) == cache.shape[3] == {576: 656, 512: 584}[q.shape[3]]
    if q.shape[3] == 512:  # our functions take a v4 cache as padded pages
        cache = cache.as_strided((len(cache), cache.stride(0)), (cache.stride(0), 1))
    out, lse = functions.sparse_attention_paged(q, cache, indices, scale)
    return [out, lse.transpose(1, 2).contiguous()]


@pytest.fixture(scope="module", autouse=True)
def sgl_kernel():
    """Operators with the signatures that sglang-kernel registers."""
    library = torch.library.Library("sgl_kernel", "DEF")
    for schema, stand_in in (
        ("fast_topk(Tensor score, Tensor indices, Tensor lengths, Tensor? row_starts) -> ()", _fast_topk),
        (
            "fast_topk_transform_fused(Tensor score, Tensor lengths, Tensor dst_page_table, Tensor src_page_table, "
            "Tensor cu_seqlens_q, Tensor? row_starts) -> ()",
            _fast_topk_slots,
        ),
        ("sparse_prefill_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v) -> Tensor[]", _sparse_prefill),
        (
            "get_mla_decoding_metadata(Tensor seqlens_k, int num_q_tokens_per_head_k, int h_k, int? h_q, "
            "bool is_fp8_kvcache, int? topk) -> Tensor[]",
            _metadata,
        ),
        (
            "fwd_kvcache_mla(Tensor q, Tensor kv_cache, int head_size_v, Tensor seqlens_k, Tensor block_table, "
            "float softmax_scale, bool is_causal, Tensor tile_scheduler_metadata, Tensor num_splits, bool is_fp8, "
            "Tensor? indices) -> Tensor[]",
            _decode,
        ),
    ):
        library.define(schema)
        library.impl(schema.partition("(")[0], stand_in, "CPU")
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def deep_gemm_stand_in(monkeypatch):
    """DeepGEMM's functions; its logits come with columns to spare."""

    def logits(q, keys, weights, starts, ends, clean_logits):
        return functions.indexer_logits(q, *keys, weights, starts, ends)

    def metadata(lengths, page, sms):
        assert lengths.dim() == 2 and page == 64
        return lengths.new_zeros(sms + 1, 2)

    def paged(q, cache, weights, lengths, table, schedule, context, clean_logits):
        assert q.shape[1] in deep_gemm.NEXT_N and lengths.shape == q.shape[:2] and schedule.shape[1] == 2
        found = functions.indexer_logits_paged(q, cache, weights, lengths, table, context)
        return torch.nn.functional.pad(found, (0, -context % 256))

    library = SimpleNamespace(
        fp8_mqa_logits=logits, get_paged_mqa_logits_metadata=metadata, fp8_paged_mqa_logits=paged, set_pdl=lambda on: None
    )
    monkeypatch.setattr(deep_gemm, "imported", lambda name: library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))


@pytest.mark.parametrize(
    ("peer", "each", "label"),
    [
        (deep_gemm, INDEXER, "DeepGEMM"),
        (deep_gemm, INDEXER_DECODE, "DeepGEMM"),
        (deep_gemm, INDEXER_MTP, "DeepGEMM (queries as sequences)"),
        (fast_topk, SELECT, "fast_topk"),
        (torch_topk, SELECT, "torch.topk"),
        (flashmla, ATTENTION, "FlashMLA (padded to 64)"),
        (flashmla, ATTENTION_512, "FlashMLA"),
        (flashmla, ATTENTION_DECODE, "FlashMLA"),
        (flashmla, ATTENTION_DECODE_V4, "FlashMLA (padded to 64)"),
        (unfused, INDEXER, "PyTorch (unfused)"),
        (unfused, ATTENTION, "PyTorch (unfused)"),
        (unfused, ATTENTION_DECODE, "PyTorch (unfused)"),
        (chain, CHOICE, "DeepGEMM + fast_topk"),
        (chain, CHOICE_DECODE, "DeepGEMM + fast_topk"),
        (chain, LAYER, "DeepGEMM + fast_topk + FlashMLA"),
        (chain, LAYER_DECODE, "DeepGEMM + fast_topk + FlashMLA"),
    ],
    ids=lambda value: getattr(value, "id", None),
)
def test_an_adapter_agrees_with_the_reference(peer, each, label):
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(2, "cpu"))
    (adapter,) = (found for found in peer.PEERS if each.stage in found.stages)
    prepared = adapter.prepare(each, inputs)
    assert prepared.label == label
    outputs = prepared.outputs(prepared.run())
    accuracy = stage.check(each, inputs, outputs, stage.reference(each, inputs), exact=False)
    assert accuracy.passed or accuracy.similarity < 1e-4, accuracy.detail


def test_adapters_say_what_they_do_not_serve():
    few_heads = case("indexer_prefill", "causal", {"queries": 8, "context": 96, "heads": 16, "head_dim": 64})
    assert deep_gemm.PEERS[0].prepare(few_heads, {}) is None
    assert fast_topk.PEERS[0].prepare(case("select", "normal", {"rows": 1, "context": 4096, "k": 512}), {}) is None
    for wrong in ({"k": 96}, {"head_dim": 192}, {"heads": 256}):
        assert flashmla.PEERS[0].prepare(case("attention_prefill", "random", {**dict(ATTENTION.shape), **wrong}), {}) is None
    assert unfused.PEERS[0].prepare(ATTENTION_DECODE_V4, {}) is None
    long = case("indexer_prefill", "causal", {"queries": 4096, "context": 32768, "heads": 64, "head_dim": 128})
    assert unfused.PEERS[0].prepare(long, {}) is None


def test_flashinfer_is_called_with_its_options(monkeypatch):
    calls = []

    def top_k(scores, k, sorted, **options):
        calls.append(options)
        return scores.topk(k, dim=1)

    monkeypatch.setattr(flashinfer, "imported", lambda name: SimpleNamespace(top_k=top_k))
    stage = stage_of("select")
    inputs = stage.inputs(SELECT, Draw(0, "cpu"))
    for peer in flashinfer.PEERS[:2]:
        prepared = peer.prepare(SELECT, inputs)
        outputs = prepared.outputs(prepared.run())
        assert stage.check(SELECT, inputs, outputs, stage.reference(SELECT, inputs), exact=False).passed
    assert calls == [{}, {"deterministic": True}]


class _Mla:
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


@pytest.mark.parametrize("each", [ATTENTION, ATTENTION_512], ids=lambda each: each.id)
def test_flashinfer_attends_page_by_page(monkeypatch, each):
    library = SimpleNamespace(mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=_Mla))
    monkeypatch.setattr(flashinfer, "imported", lambda name: library)
    monkeypatch.setattr(flashinfer, "_WORKSPACE", 16)
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(0, "cpu"))
    prepared = flashinfer.PEERS[2].prepare(each, inputs)
    accuracy = stage.check(each, inputs, prepared.outputs(prepared.run()), stage.reference(each, inputs), exact=False)
    assert prepared.label == "FlashInfer MLA" and accuracy.passed, accuracy.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_torch_takes_part():
    able = {peer.name for peer in peers.load(peers.sources()) if peer.available() is None}
    assert able == {"torch.topk", "PyTorch (unfused)"}


def test_a_missing_library_is_a_reason():
    libraries.sgl_kernel.cache_clear()
    assert libraries.sgl_kernel("flashmla_ops.abi3.so") == "sglang-kernel is not installed"
    assert libraries.imported("no_such_library") == "no_such_library is not installed"


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "sgl_kernel").mkdir()
    (tmp_path / "sgl_kernel" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "sgl_kernel" / "broken.so").write_bytes(b"not a library")
    (tmp_path / "broken_module.py").write_text("raise OSError('libnuma is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries.sgl_kernel("absent.so") == "sglang-kernel has no absent.so"
    assert libraries.sgl_kernel("broken.so").startswith("broken.so cannot be loaded")
    assert libraries.imported("broken_module") == "broken_module cannot be imported: OSError: libnuma is missing"


def test_dense_attention_runs_group_after_group():
    q, k, v = (torch.randn(1, 2, tokens, d).bfloat16() for tokens, d in ((4, 192), (16, 192), (16, 128)))
    dense.attention_of(q, k, v, groups=3)()
