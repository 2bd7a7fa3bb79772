"""Generate with a model of transformers whose sparse attention runs by these kernels: one call switches it on.

    python examples/generate_with_transformers.py                                  # a tiny random model, on the CPU
    python examples/generate_with_transformers.py tiny cuda                        # the same in bf16 on a GPU
    python examples/generate_with_transformers.py deepseek-ai/DeepSeek-V3.2 cuda   # a checkpoint

Needs transformers 5.17 or newer: ``pip install 'dsa-codegen[transformers]'``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dsa_codegen.integrations.transformers import disable, enable

PROMPTS = ["Sparse attention reads", "In one sentence: what does a lightning indexer score, and for whom?"]
NEW = 16


def tiny(dtype: torch.dtype) -> Any:
    """Two layers of DeepSeek-V3.2's kind with random weights; prompts of 300 tokens, of which each query reads 64."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 32, "v_head_dim": 32}
    latents = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "head_dim": 16}
    index = {"index_topk": 64, "index_n_heads": 8, "index_head_dim": 32}
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    text = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v32", **heads, **latents, **index, **layers, **text)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def inputs_of(name: str, device: str) -> dict[str, torch.Tensor]:
    """Two prompts, the shorter one padded on the left."""
    if name != "tiny":
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        return tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
    ids = torch.randint(2, 256, (2, 300), device=device)
    mask = torch.ones_like(ids)
    ids[0, :100], mask[0, :100] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def main(name: str = "tiny", device: str = "cpu") -> None:
    """Generate with the model's own attention and with these kernels, from a dynamic and from a static cache."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name == "tiny":
        model = tiny(dtype).to(device).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device).eval()
    inputs = inputs_of(name, device)
    own: torch.Tensor | None = None
    for who, switch in (("its own attention", disable), ("these kernels", enable)):
        switch(model)
        for cache in ("dynamic", "static"):
            begin = time.perf_counter()
            made = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, cache_implementation=cache, disable_compile=True, pad_token_id=0
            )
            own = made if own is None else own
            same = (made == own)[:, -NEW:].float().mean().item()
            print(f"{who}, {cache} cache: {time.perf_counter() - begin:.1f} s, {same:.0%} of the tokens as the first time")
    if name != "tiny":
        print(*AutoTokenizer.from_pretrained(name).batch_decode(made, skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
