"""Megatron-core's hooks: the signatures of its 0.19, and what they give beside the package's own functions."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.problem.draw import Draw
from dsa_codegen.train import megatron

_PLACE = "use_local_indexer_varlen single_packed_thd_sequence local_packed_cp_rank local_packed_cp_query_start"
_PLACE += " local_packed_cp_query_len packed_seq_params cp_size"
_CHOICE = "q k weights index_topk starts ends block_size"
# As megatron-core 0.19.0's dsa_kernels calls them, by keyword (the attention by position).
CALLED = {
    "run_fused_qk_topk": f"{_CHOICE} use_relu {_PLACE}",
    "run_fused_qk_topk_with_loss": f"config {_CHOICE} query key softmax_scale loss_coeff pg_collection query_valid_rows "
    f"calculate_per_token_loss use_relu {_PLACE}",
    "run_fused_absorbed_sparse_attention": "query key topk_indices softmax_scale v_channels topk_length",
}
QUERIES, TOKENS, BATCH, SCALE = 70, 90, 2, 0.04


@pytest.mark.parametrize("name", CALLED)
def test_hooks_take_what_megatron_passes(name):
    parameters = inspect.signature(getattr(megatron, name)).parameters
    assert set(parameters) == set(CALLED[name].split())
    if name == "run_fused_absorbed_sparse_attention":
        assert list(parameters) == CALLED[name].split()


def given():
    draw, bf16 = Draw(4), {"dtype": torch.bfloat16}
    ends = torch.arange(TOKENS - QUERIES, TOKENS, dtype=torch.int32) + 1
    indexer = {
        "q": draw.normal(QUERIES, BATCH, 8, 32, **bf16).requires_grad_(),
        "k": draw.normal(TOKENS, BATCH, 32, **bf16).requires_grad_(),
        "weights": draw.normal(QUERIES, BATCH, 8, **bf16).requires_grad_(),
        "index_topk": 64,
        "starts": torch.zeros_like(ends),
        "ends": ends,
        "block_size": 16,
    }
    query = draw.normal(QUERIES, BATCH, 2, 576, **bf16).requires_grad_()
    return indexer, query, draw.normal(TOKENS, BATCH, 1, 576, **bf16).requires_grad_()


def test_choice_and_attention_are_the_packages():
    indexer, query, key = given()
    chosen, lengths = megatron.run_fused_qk_topk(**indexer)
    assert lengths is None and chosen.shape == (BATCH, QUERIES, 64)
    attended = megatron.run_fused_absorbed_sparse_attention(query, key, chosen.long(), SCALE, 512)
    for i in range(BATCH):
        parts = [each.detach()[:, i].contiguous() for each in (indexer["q"], indexer["k"], indexer["weights"])]
        own = dsa.index_select(*parts[:2], None, parts[2].float(), indexer["starts"], indexer["ends"], 64, scores="bf16")
        assert torch.equal(chosen[i], own)
        q, kv = query.detach()[:, i].contiguous(), key.detach()[:, i].contiguous()
        assert torch.equal(attended[:, i], dsa.sparse_attention(q, kv, own[:, None], SCALE)[0])
    attended.float().sum().backward()
    assert query.grad.abs().sum() > 0 and key.grad.abs().sum() > 0


@pytest.mark.parametrize("per_token", [False, True])
def test_the_loss_is_the_indexers_over_valid_rows(per_token):
    indexer, query, key = given()
    valid = torch.arange(BATCH * QUERIES).view(BATCH, QUERIES) % 3 > 0
    more = {"softmax_scale": SCALE, "loss_coeff": 0.5, "pg_collection": types.SimpleNamespace(tp=None)}
    chosen, _, loss = megatron.run_fused_qk_topk_with_loss(
        **indexer, query=query, key=key, **more, query_valid_rows=valid, calculate_per_token_loss=per_token
    )
    wanted = torch.zeros(())
    for i in range(BATCH):
        rows = valid[i].nonzero()[:, 0]
        q, kv, lists = query.detach()[rows, i], key.detach()[:, i].contiguous(), chosen[i][rows][:, None]
        lse = dsa.sparse_attention(q, kv, lists, SCALE)[1]
        parts = indexer["q"][rows, i], indexer["k"][:, i], indexer["weights"][rows, i]
        wanted = wanted + len(rows) * dsa.train.indexer_loss(q, kv, lse, *parts, SCALE, indices=lists)
    torch.testing.assert_close(loss, 0.5 * (wanted if per_token else wanted / valid.sum()))
    loss.backward()
    assert all(indexer[name].grad.abs().sum() > 0 for name in ("q", "k", "weights"))
    assert query.grad is None and key.grad is None


def test_what_is_not_served_is_left_to_megatron():
    indexer, query, key = given()
    assert megatron.run_fused_qk_topk(**{**indexer, "use_relu": False}) is None
    assert megatron.run_fused_qk_topk(**{**indexer, "q": indexer["q"].float()}) is None
    assert megatron.run_fused_qk_topk(**indexer, use_local_indexer_varlen=True, packed_seq_params=object(), cp_size=2) is None
    assert megatron.run_fused_absorbed_sparse_attention(query, key.repeat(1, 1, 2, 1), torch.zeros(1), SCALE, 512) is None
    assert megatron.run_fused_absorbed_sparse_attention(query, key, torch.zeros(1), SCALE, 256) is None


def test_enable_names_this_module_as_a_backend(monkeypatch):
    hooks = types.SimpleNamespace(_BACKEND_MODULE_NAME_BY_BACKEND={"tilelang": "theirs"})
    monkeypatch.setitem(sys.modules, megatron._HOOKS, hooks)
    megatron.enable()
    assert hooks._BACKEND_MODULE_NAME_BY_BACKEND == {"tilelang": "dsa_codegen.train.megatron"}
