"""The adapters, with stand-ins that have the libraries' own signatures: arguments, layouts and results are as each expects."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from dsa_codegen import functions
from dsa_codegen.bench import peers
from dsa_codegen.bench.cases import FP8_PRODUCTS, LOCAL, case
from dsa_codegen.bench.peers import (
    chain,
    cudnn_frontend,
    deep_gemm,
    dense,
    fast_topk,
    flashinfer,
    flashmla,
    padded_flash_mla,
    q8kv8,
    sgl_flash_mla,
    topk_v2,
    torch_topk,
    triton_mla,
    unfused,
    vllm_fa3,
    vllm_topk,
)
from dsa_codegen.bench.problems import stage_of
from dsa_codegen.problem.draw import Draw

import peer_stand_ins as stand_ins

_INDEX = {"heads": 32, "head_dim": 64}
_PAGED = {"batch": 2, "next_n": 1, "context": 192, "page": 64}
INDEXER = case("indexer_prefill", "causal", {"queries": 8, "context": 96, **_INDEX})
INDEXER_DECODE = case("indexer_decode", "full", {**_PAGED, **_INDEX})
INDEXER_MTP = case("indexer_decode", "full", {**_PAGED, "next_n": 3, **_INDEX})
INDEXER_128 = case("indexer_prefill", "causal", {"queries": 8, "context": 96, "heads": 32, "head_dim": 128})
MANY_ROWS = case("select", "normal", {"rows": 130, "context": 2500, "k": 2048})
SELECT = case("select", "normal", {"rows": 3, "context": 2500, "k": 2048})
ATTENTION = case("attention_prefill", "random", {"queries": 3, "context": 200, "heads": 8, "head_dim": 576, "k": 128})
ATTENTION_512 = case("attention_prefill", "random", {"queries": 3, "context": 200, "heads": 64, "head_dim": 512, "k": 128})
ATTENTION_8 = case("attention_prefill", LOCAL, {"queries": 4, "context": 400, "heads": 8, "head_dim": 576, "k": 128})
ATTENTION_FP8 = case("attention_prefill", FP8_PRODUCTS, dict(ATTENTION.shape))
PROMPT = case("attention_prefill_paged", "random", {**dict(ATTENTION.shape), "page": 64})
ATTENTION_DECODE = case("attention_decode", "random", {**_PAGED, "heads": 64, "head_dim": 576, "k": 64})
ATTENTION_DECODE_V4 = case("attention_decode", "random", {**_PAGED, "next_n": 2, "heads": 16, "head_dim": 512, "k": 64})
TWO_POOLS = case("attention_decode", "random", {**_PAGED, "heads": 64, "head_dim": 512, "k": 128, "extra_k": 64})
CHOICE = case("index_select_prefill", "causal", {"queries": 4, "context": 2100, "k": 2048, **_INDEX})
CHOICE_DECODE = case("index_select_decode", "full", {**_PAGED, "context": 2112, "k": 2048, **_INDEX})
LAYER = case("layer_prefill", "real", {"queries": 2, "context": 2100, "heads": 64, "head_dim": 576, "k": 2048})
LAYER_16 = case("layer_prefill", "real", {"queries": 2, "context": 2100, "heads": 16, "head_dim": 576, "k": 2048})
ENGINE = case("engine_prefill", "real", {"queries": 2, "context": 2100, "heads": 64, "head_dim": 576, "k": 2048})
ENGINE_DECODE = case("engine_decode", "real", {**_PAGED, "context": 2112, "heads": 64, "head_dim": 576, "k": 2048})
LAYER_DECODE = case("layer_decode", "real", {**_PAGED, "context": 2112, "heads": 64, "head_dim": 576, "k": 2048})


@pytest.fixture(scope="module", autouse=True)
def sgl_kernel():
    """Operators with the signatures that sglang-kernel registers."""
    library = torch.library.Library("sgl_kernel", "DEF")
    for schema, stand_in in (
        ("fast_topk(Tensor score, Tensor indices, Tensor lengths, Tensor? row_starts) -> ()", stand_ins.fast_topk),
        (
            "fast_topk_transform_fused(Tensor score, Tensor lengths, Tensor dst_page_table, Tensor src_page_table, "
            "Tensor cu_seqlens_q, Tensor? row_starts) -> ()",
            stand_ins.fast_topk_slots,
        ),
        (
            "sparse_prefill_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v) -> Tensor[]",
            stand_ins.sparse_prefill,
        ),
        (
            "get_mla_decoding_metadata(Tensor seqlens_k, int num_q_tokens_per_head_k, int h_k, int? h_q, "
            "bool is_fp8_kvcache, int? topk) -> Tensor[]",
            stand_ins.metadata,
        ),
        (
            "fwd_kvcache_mla(Tensor q, Tensor kv_cache, int head_size_v, Tensor seqlens_k, Tensor block_table, "
            "float softmax_scale, bool is_causal, Tensor tile_scheduler_metadata, Tensor num_splits, bool is_fp8, "
            "Tensor? indices) -> Tensor[]",
            stand_ins.decode,
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


@pytest.fixture(scope="module", autouse=True)
def sgl_flash_mla_operators():
    """Operators with the signatures that sgl-flash-mla's legacy library registers."""
    library = torch.library.Library("flash_mla_legacy", "DEF")
    define(
        library,
        "sparse_prefill_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v, Tensor? attn_sink=None, "
        "Tensor? topk_length=None, bool return_log2_stats=False, bool return_stats=True) -> Tensor?[]",
        lambda q, kv, indices, sm_scale, d_v, sink=None, length=None, log2=False, stats=True: stand_ins.sparse_prefill(
            q, kv, indices, sm_scale, d_v, sink
        ),
    )
    define(
        library,
        "sparse_decode_fwd(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? attn_sink, "
        "Tensor(a!)? tile_scheduler_metadata, Tensor(b!)? num_splits, Tensor? extra_kv, Tensor? extra_indices, "
        "Tensor? extra_topk_length, int d_v, float sm_scale, str? kv_format=None) -> (Tensor, Tensor, Tensor(a)?, Tensor(b)?)",
        stand_ins.legacy_decode,
    )
    yield
    library._destroy()


@pytest.fixture(scope="module", autouse=True)
def vllm_operators():
    """Operators with the signatures that vLLM's libraries register."""
    topk, fa3 = torch.library.Library("_C", "FRAGMENT"), torch.library.Library("_vllm_fa3_C", "DEF")
    arguments = "(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) -> ()"
    for name in ("persistent_topk", "cooperative_topk"):
        define(topk, name + arguments, stand_ins.vllm_topk)
    define(
        fa3,
        "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
        "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
        "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
        "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
        "bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, "
        "Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]",
        stand_ins.fa3,
    )
    yield
    topk._destroy()
    fa3._destroy()


def define(library, schema, stand_in):
    """An operator that runs on the CPU."""
    library.define(schema)
    library.impl(schema.partition("(")[0], stand_in, "CPU")


@pytest.fixture(autouse=True)
def python_libraries(monkeypatch):
    """The functions of the libraries that are Python modules."""
    top_k = {
        "plan_topk_v2": stand_ins.plan,
        "topk_transform_paged_v2": stand_ins.topk_v2_paged,
        "topk_transform_ragged_v2": stand_ins.topk_v2_ragged,
    }
    monkeypatch.setattr(topk_v2, "imported", lambda name: SimpleNamespace(**top_k))
    monkeypatch.setattr(triton_mla, "library", lambda: SimpleNamespace(sparse_mla_prefill=stand_ins.triton_mla))
    monkeypatch.setattr(q8kv8, "imported", lambda name: SimpleNamespace(sparse_mla_q8kv8_prefill_fwd=stand_ins.q8kv8))
    cudnn = SimpleNamespace(indexer_forward_wrapper=stand_ins.cudnn_indexer, IndexerTopK=stand_ins.CudnnTopk)
    monkeypatch.setattr(cudnn_frontend, "imported", lambda name: cudnn)


@pytest.mark.parametrize(
    ("peer", "name", "each", "label"),
    [
        (deep_gemm, "DeepGEMM", INDEXER, ""),
        (deep_gemm, "DeepGEMM", INDEXER_DECODE, ""),
        (deep_gemm, "DeepGEMM", INDEXER_MTP, " (queries as sequences)"),
        (cudnn_frontend, "cuDNN indexer", INDEXER_128, ""),
        (fast_topk, "fast_topk", SELECT, ""),
        (topk_v2, "SGLang topk_v2", SELECT, ""),
        (topk_v2, "SGLang topk_v2", MANY_ROWS, ""),
        (topk_v2, "SGLang topk_v2 (prompt)", MANY_ROWS, ""),
        (torch_topk, "torch.topk", SELECT, ""),
        (vllm_topk, "vLLM cooperative_topk", SELECT, ""),
        (vllm_topk, "vLLM persistent_topk", MANY_ROWS, ""),
        (cudnn_frontend, "cuDNN top-k (deterministic)", SELECT, ""),
        (flashmla, "FlashMLA", ATTENTION, " (padded to 64)"),
        (flashmla, "FlashMLA", ATTENTION_512, ""),
        (flashmla, "FlashMLA", ATTENTION_DECODE, ""),
        (flashmla, "FlashMLA", ATTENTION_DECODE_V4, " (padded to 64)"),
        (flashmla, "FlashMLA", PROMPT, " (padded to 64)"),
        (flashmla, "gather_kv + FlashMLA", PROMPT, " (padded to 64)"),
        (sgl_flash_mla, "sgl-flash-mla", ATTENTION, " (padded to 64)"),
        (sgl_flash_mla, "sgl-flash-mla", ATTENTION_512, ""),
        (sgl_flash_mla, "sgl-flash-mla", ATTENTION_DECODE, ""),
        (sgl_flash_mla, "sgl-flash-mla", ATTENTION_DECODE_V4, " (padded to 64)"),
        (sgl_flash_mla, "sgl-flash-mla", TWO_POOLS, ""),
        (sgl_flash_mla, "sgl-flash-mla", PROMPT, " (padded to 64)"),
        (sgl_flash_mla, "gather_kv + sgl-flash-mla", PROMPT, " (padded to 64)"),
        (triton_mla, "SGLang Triton MLA", ATTENTION, ""),
        (triton_mla, "SGLang Triton MLA (union of 2)", ATTENTION_8, ""),
        (triton_mla, "SGLang Triton MLA (union of 4)", ATTENTION_8, ""),
        (q8kv8, "SGLang Q8KV8", ATTENTION_FP8, " (padded to 64)"),
        (vllm_fa3, "FA3 (vLLM)", ATTENTION, ""),
        (unfused, "PyTorch (unfused)", INDEXER, ""),
        (unfused, "PyTorch (unfused)", ATTENTION, ""),
        (unfused, "PyTorch (unfused)", ATTENTION_DECODE, ""),
        (chain, "DeepGEMM + fast_topk", CHOICE, ""),
        (chain, "DeepGEMM + fast_topk", CHOICE_DECODE, ""),
        (chain, "DeepGEMM + topk_v2", CHOICE, ""),
        (chain, "DeepGEMM + topk_v2", CHOICE_DECODE, ""),
        (chain, "DeepGEMM + fast_topk + FlashMLA", LAYER, ""),
        (chain, "DeepGEMM + fast_topk + FlashMLA", LAYER_DECODE, ""),
        (chain, "DeepGEMM + topk_v2 + sgl-flash-mla", LAYER_16, " (padded to 64)"),
        (chain, "DeepGEMM + topk_v2 + sgl-flash-mla", LAYER_DECODE, ""),
        (chain, "DeepGEMM + fast_topk + FlashMLA", ENGINE, ""),
        (chain, "DeepGEMM + topk_v2 + sgl-flash-mla", ENGINE_DECODE, ""),
    ],
    ids=lambda value: getattr(value, "id", value) if not hasattr(value, "PEERS") else "",
)
def test_an_adapter_agrees_with_the_reference(peer, name, each, label):
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(2, "cpu"))
    adapter = named(peer, name)
    assert each.stage in adapter.stages
    prepared = adapter.prepare(each, inputs)
    assert prepared.label == name + label
    outputs = prepared.outputs(prepared.run())
    accuracy = stage.check(each, inputs, outputs, stage.reference(each, inputs), exact=False)
    assert accuracy.passed or accuracy.similarity < adapter.similarity, accuracy.detail


_LATENT = {"heads": 32, "head_dim": 160, "k": 2048}
OTHERS = [
    (padded_flash_mla, case("model_prefill", "ax-k2", {"queries": 2, "context": 2100, **_LATENT}), "64 heads, 512 channels)"),
    (vllm_fa3, case("model_prefill", "ax-k2", {"queries": 2, "context": 2100, **_LATENT}), "tokens as pages"),
    (
        padded_flash_mla,
        case("model_prefill", "glm-5.3-flash", {"queries": 1, "context": 2200, "heads": 64, "head_dim": 512, "k": 2063}),
        "(padded to k 2176)",
    ),
    (padded_flash_mla, case("model_decode", "hy4", {**_PAGED, "context": 1088, **_LATENT, "head_dim": 576}), "64 heads)"),
    (
        padded_flash_mla,
        case("model_decode", "deepseek-v4.1", {**_PAGED, "context": 320, "heads": 64, "head_dim": 512, "k": 512}),
        "(BF16 cache)",
    ),
]


@pytest.mark.parametrize(("module", "each", "label"), OTHERS, ids=lambda value: getattr(value, "id", ""))
def test_what_serves_other_shapes_agrees_with_the_reference(module, each, label):
    """FlashMLA with what it was not made for padded, FA3 with a page for each token."""
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(2, "cpu"))
    prepared = module.PEERS[-1].prepare(each, inputs)
    assert prepared.label.endswith(label)
    found = prepared.outputs(prepared.run())
    accuracy = stage.check(each, inputs, found, stage.reference(each, inputs), exact=False)
    assert accuracy.passed or accuracy.similarity < 1e-4, accuracy.detail


def named(module, name):
    """The adapter of that name."""
    (adapter,) = (peer for peer in module.PEERS if peer.name == name)
    return adapter


@pytest.mark.parametrize(
    ("module", "name", "each"),
    [
        (topk_v2, "SGLang topk_v2", case("select", "normal", {"rows": 1, "context": 2501, "k": 2048})),
        (topk_v2, "SGLang topk_v2 (prompt)", SELECT),
        (vllm_topk, "vLLM cooperative_topk", MANY_ROWS),
        (vllm_topk, "vLLM persistent_topk", case("select", "normal", {"rows": 1, "context": 2500, "k": 100})),
        (triton_mla, "SGLang Triton MLA", ATTENTION_512),
        (
            triton_mla,
            "SGLang Triton MLA (union of 4)",
            case("attention_prefill", LOCAL, {**dict(ATTENTION_8.shape), "heads": 16}),
        ),
        (q8kv8, "SGLang Q8KV8", ATTENTION),
        (vllm_fa3, "FA3 (vLLM)", ATTENTION_512),
        (cudnn_frontend, "cuDNN indexer", INDEXER),
        (flashmla, "FlashMLA", TWO_POOLS),
        (flashmla, "gather_kv + FlashMLA", case("attention_prefill_paged", "random", {**dict(PROMPT.shape), "head_dim": 512})),
    ],
    ids=lambda value: getattr(value, "id", value) if not hasattr(value, "PEERS") else "",
)
def test_what_a_library_does_not_have_is_not_asked_of_it(module, name, each):
    assert named(module, name).prepare(each, {}) is None


def test_a_schedule_is_made_once_for_all_calls(monkeypatch):
    inputs = stage_of("attention_decode").inputs(ATTENTION_DECODE, Draw(0, "cpu"))
    prepared = named(sgl_flash_mla, "sgl-flash-mla").prepare(ATTENTION_DECODE, inputs)
    made = []
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda self, *shape, **options: made.append(shape) or torch.zeros(*shape))
    prepared.run()
    assert (4, 8) not in made


def test_who_promises_what():
    promises = {
        peer.name: (peer.deterministic, peer.ordered) for peer in peers.load(peers.sources()) if "select" in peer.stages
    }
    assert {name for name, kept in promises.items() if kept[0]} == {
        "FlashInfer (deterministic)",
        "CUB (lowest index)",
        "cuDNN top-k (deterministic)",
    }
    assert {name for name, kept in promises.items() if kept[1]} == {"cuDNN top-k (deterministic)"}
    assert None not in {ordered for _, ordered in promises.values()}


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
        calls.append((options, os.environ.get("FLASHINFER_TOPK_ALGO")))
        return scores.topk(k, dim=1)

    monkeypatch.setenv("FLASHINFER_TOPK_ALGO", "clusters")

    monkeypatch.setattr(flashinfer, "imported", lambda name: SimpleNamespace(top_k=top_k))
    stage = stage_of("select")
    inputs = stage.inputs(SELECT, Draw(0, "cpu"))
    for peer in flashinfer.PEERS[:3]:
        prepared = peer.prepare(SELECT, inputs)
        outputs = prepared.outputs(prepared.run())
        assert stage.check(SELECT, inputs, outputs, stage.reference(SELECT, inputs), exact=False).passed
    assert calls == [({}, "clusters"), ({"deterministic": True}, "clusters"), ({"tie_break": 1}, "cub")]
    assert os.environ["FLASHINFER_TOPK_ALGO"] == "clusters"


@pytest.mark.parametrize("each", [ATTENTION, ATTENTION_512], ids=lambda each: each.id)
def test_flashinfer_attends_page_by_page(monkeypatch, each):
    library = SimpleNamespace(mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=stand_ins.Mla))
    monkeypatch.setattr(flashinfer, "imported", lambda name: library)
    monkeypatch.setattr(flashinfer, "_WORKSPACE", 16)
    stage = stage_of(each.stage)
    inputs = stage.inputs(each, Draw(0, "cpu"))
    prepared = flashinfer.PEERS[3].prepare(each, inputs)
    accuracy = stage.check(each, inputs, prepared.outputs(prepared.run()), stage.reference(each, inputs), exact=False)
    assert prepared.label == "FlashInfer MLA" and accuracy.passed, accuracy.detail


def test_dense_attention_runs_group_after_group():
    q, k, v = (torch.randn(1, 2, tokens, d).bfloat16() for tokens, d in ((4, 192), (16, 192), (16, 128)))
    dense.attention_of(q, k, v, groups=3)()
