"""What a group of ranks computes on: steps with exact scores, and how their rows, caches and heads are dealt out."""

from __future__ import annotations

from typing import Any

import torch

import dsa_codegen as dsa
from dsa_codegen.distributed import Deal, Shard
from dsa_codegen.problem.caches import KvV32Layout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.presets import Model

import deepseek_layer
import exact_inputs

TOPK, PAGE, CONTEXT, HEADS = 64, 16, 290, 8
ROWS = [(26, 300), (3, 300), (1, 40), (0, 40)]
KEEP = [{}, {"keep_first": 3, "keep_recent": 9}]
STEPS = [(5, 2), (1, 1), (0, 1)]
TOKENS = (131, 3, 0)
"""Of a step whose rows are dealt out; fewer than ranks, and none."""
MODEL = Model("exact", HEADS, 512, 64, exact_inputs.HEADS, exact_inputs.HEAD_DIM, TOPK, page=PAGE, attn_sink=True)


def worlds(processes: int) -> list[int]:
    """The sizes of groups."""
    return list(range(2, processes + 1))


def on(device: str, value: Any) -> Any:
    """The same with every tensor on the device, in plain tuples and lists."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on(device, each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        moved = [on(device, each) for each in value]
        return moved if isinstance(value, list) else tuple(moved)
    return value


def shards(world: int) -> dict[str, list[Shard]]:
    """By name, the shard of each rank: dealt out token by token, page by page, or cut into stretches, the last of none."""
    cuts = {4: [0, 40, 41, CONTEXT, CONTEXT], 2: [0, CONTEXT, CONTEXT]}.get(world)
    cuts = cuts or [0, *(CONTEXT * rank // world for rank in range(1, world)), CONTEXT]
    return {
        "tokens": [Shard.interleaved(rank, world) for rank in range(world)],
        "pages": [Shard.interleaved(rank, world, PAGE) for rank in range(world)],
        "stretches": [Shard.stretch(cuts[rank], cuts[rank + 1] - cuts[rank]) for rank in range(world)],
    }


def deals(tokens: int, world: int) -> dict[str, Deal]:
    """By name; the last gives all rows to the last ranks."""
    keys = exact_inputs.windows(tokens)[1].tolist()
    nothing = [torch.arange(0)] * (world - 1)
    return {
        "zigzag": Deal.zigzag(tokens, world),
        "interleaved": Deal.interleaved(tokens, world),
        "by_keys": Deal.by_keys(keys, world, 8),
        "last": Deal([*nothing, torch.arange(tokens)]),
    }


def attended(batch: int, next_n: int) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A decode step: the indexer's arguments, the KV cache, queries of attention, sinks."""
    inputs, draw = exact_inputs.paged(batch, next_n, CONTEXT, PAGE), Draw(6)
    layout = KvV32Layout(PAGE)
    kv_cache = layout.empty(len(inputs["cache"]))
    slots = torch.arange(len(kv_cache) * PAGE)
    nope = draw.normal(len(slots), 512, dtype=torch.bfloat16, scale=0.1)
    dsa.store_kv(nope, draw.normal(len(slots), 64, dtype=torch.bfloat16, scale=0.1), slots.int(), kv_cache)
    q = draw.normal(batch, next_n, HEADS, 576, dtype=torch.bfloat16, scale=10.0)
    return inputs, kv_cache, q, draw.normal(HEADS)


def prefill_step(tokens: int) -> dict:
    """Arguments of ``Layer.prefill`` of all rows: as many queries as tokens, windows of two sequences, exact scores."""
    draw = Draw(9)
    starts, ends = exact_inputs.windows(tokens)
    return {
        "q": draw.normal(tokens, HEADS, 576, dtype=torch.bfloat16, scale=10.0),
        "kv": draw.normal(tokens, 1, 576, dtype=torch.bfloat16, scale=0.1),
        **exact_inputs.unquantised(tokens),
        **{f"index_{name}": exact_inputs.prefill(tokens, tokens)[name] for name in ("k", "k_scale")},
        "starts": starts,
        "ends": ends,
        "sink": draw.normal(HEADS),
    }


def decode_step(batch: int, next_n: int) -> dict:
    """Arguments of ``Layer.decode`` over whole caches, with exact scores."""
    inputs, kv_cache, q, sink = attended(batch, next_n)
    index = exact_inputs.unquantised(batch * next_n)
    return {
        "q": q,
        "kv_cache": kv_cache,
        "index_q": index["index_q"].unflatten(0, (batch, next_n)),
        "index_weights": index["index_weights"].unflatten(0, (batch, next_n)),
        "index_cache": inputs["cache"],
        **{name: inputs[name] for name in ("lengths", "page_table", "max_context")},
        "sink": sink,
    }


def own_rows(step: dict, deal: Deal, rank: int) -> dict:
    """The rank's part of a step."""
    return {name: value if name == "sink" else deal.own(value, rank) for name, value in step.items()}


def nn_model() -> Model:
    """Of the module's tests."""
    return Model("v3.2", deepseek_layer.HEADS, 512, 64, deepseek_layer.INDEX_HEADS, deepseek_layer.INDEX_DIM, TOPK)


OF_ROWS = ("q", "index_q", "index_weights", "starts", "ends")
OF_SEQUENCES = ("q", "index_q", "index_weights", "lengths", "page_table")


def heads_of(rank: int, world: int) -> slice:
    """The rank's, at least one."""
    return slice(HEADS * rank // world, HEADS * (rank + 1) // world)


def of_heads(step: dict, rank: int, world: int) -> dict:
    """The step with the rank's heads."""
    heads = heads_of(rank, world)
    return {**step, "q": step["q"][..., heads, :].contiguous(), "sink": step["sink"][heads].clone()}
