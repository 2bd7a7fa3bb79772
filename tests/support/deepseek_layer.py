"""A tiny DeepSeek-V3.2 attention layer: its weights and inputs by formula, and what transformers' layer makes of them.

python tests/support/deepseek_layer.py   # with transformers 5.17 or newer: writes tests/nn/fixtures/deepseek_v32.npz
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsa_codegen import nn
from dsa_codegen.distributed import gather_rows
from dsa_codegen.distributed.modes import Alone
from dsa_codegen.problem.presets import Model

FIXTURE = Path(__file__).resolve().parents[1] / "nn/fixtures/deepseek_v32.npz"
TOKENS = 140
HIDDEN, HEADS, Q_RANK, D_HEAD, D_V = 64, 4, 32, 16, 16
INDEX_HEADS, INDEX_DIM, TOPK = 8, 64, 64
_SHAPES = {
    "q_a_proj.weight": (Q_RANK, HIDDEN),
    "q_a_layernorm.weight": (Q_RANK,),
    "q_b_proj.weight": (HEADS * (D_HEAD + 64), Q_RANK),
    "kv_a_proj_with_mqa.weight": (512 + 64, HIDDEN),
    "kv_a_layernorm.weight": (512,),
    "kv_b_proj.weight": (HEADS * (D_HEAD + D_V), 512),
    "o_proj.weight": (HIDDEN, HEADS * D_V),
    "indexer.wq_b.weight": (INDEX_HEADS * INDEX_DIM, Q_RANK),
    "indexer.wk.weight": (INDEX_DIM, HIDDEN),
    "indexer.k_norm.weight": (INDEX_DIM,),
    "indexer.k_norm.bias": (INDEX_DIM,),
    "indexer.weights_proj.weight": (INDEX_HEADS, HIDDEN),
}


def _noise(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers between -1 and 1 without a generator, whose streams may change from version to version."""
    count = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    hashed = torch.sin((count + 1000 * number) * 12.9898 + 78.233) * 43758.5453
    return (2 * (hashed - hashed.floor()) - 1).float().view(shape)


def state() -> dict[str, torch.Tensor]:
    """The layer's parameters, fp32, as a checkpoint names them."""
    made = {}
    for number, (name, shape) in enumerate(_SHAPES.items()):
        noise = _noise(number, shape)
        made[name] = noise * (3 / shape[1]) ** 0.5 if len(shape) > 1 else noise * 0.2 + ("bias" not in name)
    return made


def hidden() -> torch.Tensor:
    """fp32 [TOKENS, HIDDEN]."""
    return 1.7 * _noise(99, (TOKENS, HIDDEN))


def steps_of_module(group: Any = None, world: int = 1, device: str = "cpu") -> torch.Tensor:
    """fp32 [tokens, HIDDEN] of this package's module, prefilled in two chunks and then decoding, heads split over the group."""
    model = Model("v3.2", HEADS, 512, 64, INDEX_HEADS, INDEX_DIM, TOPK)
    layer = nn.SparseAttention(model, nn.Shape(HIDDEN, Q_RANK, D_HEAD, D_V), group=group, dtype=torch.float32).to(device)
    layer.load_whole(state())
    caches = nn.PagedCache(model, nn.rotary_table(256, 64, device=device), layers=1, blocks=4, batch=1)
    x, done, outs = hidden().to(device), 0, []
    for count, next_n in ((70, 0), (50, 0), (1, 1), (2, 2)):
        step = caches.decode(next_n) if next_n else caches.prefill((count,), ranks=world)
        outs.append(layer(x[done : done + count], caches.layers[0], step))
        done += count
    return torch.cat(outs)


def made(model: Model, parallel: Alone | None) -> nn.SparseAttention:
    """The module with its weights, or with the part of them that the rank has."""
    layer = nn.SparseAttention(model, nn.Shape(HIDDEN, Q_RANK, D_HEAD, D_V), dtype=torch.float32, parallel=parallel)
    layer.load_whole(state())
    return layer


SEQUENCES = 3
SHARED_STEPS = (((70, 3, 0), 0), ((50, 0, 1), 0), (None, 1), ((0, 0, 2), 0), (None, 2))
"""New tokens of each sequence by step; None and a number for a step of decode. Windows are shorter and longer than topk."""


def shared_steps(parallel: Alone | None = None, invariant: bool = False, device: str = "cpu") -> list[tuple]:
    """(out, the tokens or places of the context that were chosen) of every row of every step, however ranks share them."""
    model = Model("v3.2", HEADS, 512, 64, INDEX_HEADS, INDEX_DIM, TOPK, batch_invariant=invariant)
    layer = made(model, parallel).to(device)
    table = nn.rotary_table(256, 64, device=device)
    caches = nn.PagedCache(model, table, layers=1, blocks=8, batch=SEQUENCES, parallel=parallel)
    chosen: list[torch.Tensor] = []
    layer.indexer.register_forward_hook(lambda module, args, result: chosen.append(result))
    found, done, x = [], 0, hidden().to(device)
    for counts, next_n in SHARED_STEPS:
        step = caches.decode(next_n) if counts is None else caches.prefill(counts)
        rows = sum(counts) if counts else SEQUENCES * next_n
        whole = x.repeat(2, 1)[done : done + rows]
        done += rows
        mine = step.shared.rows if step.shared is not None else None
        out = layer(whole if mine is None else whole[mine], caches.layers[0], step)
        listed = chosen.pop()
        if counts is None and step.shared is None:
            listed = _tokens_of(listed.view(SEQUENCES, -1), caches.page_table, model.page).view(listed.shape)
        if mine is not None:
            out, listed = gather_rows([out, listed], step.shared.dealt, parallel.group).wait()
        found.append((out, listed))
    return found


def _tokens_of(slots: torch.Tensor, page_table: torch.Tensor, page: int) -> torch.Tensor:
    """The tokens of each sequence that lie in slots [sequences, n]."""
    held = (slots[:, :, None] // page == page_table[:, None]) & (slots[:, :, None] >= 0)
    return torch.where(held.any(-1), held.int().argmax(-1) * page + slots % page, -1).int()


def by_transformers() -> dict[str, np.ndarray]:
    """Of transformers' layer in fp32: out [TOKENS, HIDDEN] and each query's tokens, ascending, -1 behind the last."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as modeling

    config = AutoConfig.for_model(
        "deepseek_v32",
        **{"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": Q_RANK},
        **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": D_HEAD, "v_head_dim": D_V, "head_dim": 64},
        **{"index_topk": TOPK, "index_head_dim": INDEX_DIM, "index_n_heads": INDEX_HEADS, "max_position_embeddings": 256},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    layer = modeling.DeepseekV32Attention(config, 0).eval()
    layer.load_state_dict(state())
    x, positions = hidden()[None], torch.arange(TOKENS)[None]
    kept: list[torch.Tensor] = []
    layer.indexer.register_forward_hook(lambda module, args, chosen: kept.append(chosen))
    mask = torch.full((1, 1, TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        out, _ = layer(x, modeling.DeepseekV32RotaryEmbedding(config)(x, positions), mask)
    chosen = kept[0][0].long()
    seen = torch.where(chosen <= torch.arange(TOKENS)[:, None], chosen, TOKENS).sort(1).values
    return {"out": out[0].numpy(), "chosen": torch.where(seen < TOKENS, seen, -1).to(torch.int16).numpy()}


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **by_transformers())
    print(FIXTURE, FIXTURE.stat().st_size)
