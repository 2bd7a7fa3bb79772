"""MiniMax-M3 of transformers: its indexer's blocks, attended to by these kernels, are what its own eager attention computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", "5.17", reason="transformers 5.17 or newer is not installed")

import transformers

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.integrations.transformers import disable, enable, grouped
from dsa_codegen.integrations.transformers.switch import is_enabled

from tiny_models import VOCABULARY, prompts

KIND, BLOCK, ENTRIES = "minimax_m3_vl_text", 16, 3
LENGTH, NEW = 150, 12  # of 150 tokens 48 are chosen, and the last block is not whole
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "dense", "sparse"],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_block_size": BLOCK,
    "index_topk_blocks": ENTRIES,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def model():
    if KIND not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {KIND}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made()
    torch.set_num_threads(before)


def made(**changes):
    config = transformers.AutoConfig.for_model(KIND, **{**TINY, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def hidden_of(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states


def called():
    return dsa.stats().get("attention_gqa: reference", 0)


@pytest.mark.parametrize("batch", [1, 2])
def test_every_layer_is_the_models_own(model, batch):
    """One sequence by its blocks; two, of which one is padded, by their tokens.

    It is padded on the right: on the left the model's own indexer scores what it computed of the padding.
    """
    ids = prompts(LENGTH, 0)[0][:batch]
    mask = torch.ones_like(ids)
    mask[1:, -20:] = 0
    own, before = hidden_of(model, ids, mask), called()
    ours = hidden_of(enable(model), ids, mask)
    assert is_enabled(model) and called() - before == 2
    for one, other in zip(own, ours, strict=True):
        seen = mask[..., None]
        torch.testing.assert_close(one * seen, other * seen, rtol=1e-4, atol=2e-4 * float(one.abs().max()))
    for one, other in zip(own, hidden_of(disable(model), ids, mask), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generates_the_same_tokens_as_eager(model, cache):
    ids, mask = prompts(LENGTH, 0)
    given = {"attention_mask": mask, "cache_implementation": cache, **GREEDY}
    expected = model.generate(ids, **given)
    try:
        assert torch.equal(enable(model).generate(ids, **given), expected)
    finally:
        disable(model)
    assert len(expected[:, LENGTH:].unique()) > 4


@pytest.mark.parametrize("length", [1, 5])
def test_padding_within_a_chosen_block_is_not_attended_to(length):
    draw = torch.Generator().manual_seed(1)
    heads, kv_heads, tokens, width = 4, 2, 50, 16
    q = torch.randn(2, heads, length, width, generator=draw)
    k, v = torch.randn(2, 2, kv_heads, tokens, width, generator=draw)
    ends = torch.arange(tokens - length + 1, tokens + 1)
    window = torch.stack((torch.tensor([[20], [0]]).expand(-1, length), ends.expand(2, -1)), -1).int()[:, None]
    blocks = torch.tensor([1, 3, -1]).expand(2, kv_heads, length, 3)
    module = SimpleNamespace(indexer=SimpleNamespace(block_size=BLOCK))
    found = grouped.attend(module, q, k, v, window, 0.3, blocks)
    token = torch.arange(tokens)
    seen = ((token // BLOCK == 1) | (token // BLOCK == 3)) & (token >= window[..., :1]) & (token < window[..., 1:])
    k, v = (each.repeat_interleave(2, 1) for each in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_what_is_not_served_is_refused_before_anything_changes(model):
    with pytest.raises(InputError, match=r"stage.*None.*no backward"):
        enable(model, stage="dense")
    with pytest.raises(SpecError, match=r"block.*24"):
        enable(made(index_block_size=24))
    with pytest.raises(SpecError, match=r"index_n_heads.*1.*2"):
        enable(made(index_n_heads=1))
    assert not is_enabled(model)
