"""Tiny models of transformers with random weights: every family that is served, small enough for a few layers in a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 or newer is not installed")

TOPK, VOCABULARY = 64, 128
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "head_dim": 16,
    "index_topk": TOPK,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"]},
    "hy_v4": {},
    "axk2": {},
    "mistral_large4_text": {"num_hidden_layers": 4, "kv_source_layers": [0, 1, 0, 3]},
    "dots3_note_text": {},
}
"""Model types, and what each states beside ``TINY``."""


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of that type with its own eager attention; skips where this version of transformers has none."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **FAMILIES[kind], **changes})
    torch.manual_seed(0)
    if kind == "mistral_large4_text":
        from transformers.models.mistral_large4.modeling_mistral_large4 import MistralLarge4TextModel as Model

        model = Model._from_config(config, attn_implementation="eager", dtype=dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # sinks, biases and scales by position are made as zeros, or not at all
            if parameter.dim() == 1 and not parameter.eq(1).all():
                parameter.normal_(std=0.3)
    return model.eval()


def prompts(length: int, padding: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of two prompts, the first padded on the left."""
    ids = torch.randint(2, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids.to(device), mask.to(device)
