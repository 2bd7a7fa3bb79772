"""What every rank of a group computes, and what one rank computes alone, by the same names."""

from __future__ import annotations

from typing import Any

import torch

import dsa_codegen as dsa
from dsa_codegen import distributed, nn
from dsa_codegen.distributed import ContextParallel, DataParallel, Deal, Shard, TensorParallel
from dsa_codegen.distributed import by_position as by_position_module
from dsa_codegen.problem.presets import Model

import deepseek_layer
import exact_inputs
from rank_inputs import (
    CONTEXT,
    HEADS,
    KEEP,
    MODEL,
    OF_ROWS,
    OF_SEQUENCES,
    PAGE,
    ROWS,
    STEPS,
    TOKENS,
    TOPK,
    attended,
    deals,
    decode_step,
    heads_of,
    nn_model,
    of_heads,
    on,
    own_rows,
    prefill_step,
    shards,
)


def by_rows(group: Any, world: int, device: str) -> dict:
    found = {}
    for queries, tokens in ROWS:
        inputs = on(device, exact_inputs.prefill(queries, tokens))
        for number, keep in enumerate(KEEP):
            found[queries, number] = distributed.index_select_by_rows(**inputs, topk=TOPK, group=group, **keep)
    inputs = on(device, exact_inputs.prefill(26, 300))
    bounds = {4: [0, 0, 7, 7, 26], 2: [0, 0, 26]}.get(world, [0] * world + [26])  # ranks with none
    found["bounds"] = distributed.index_select_by_rows(**inputs, topk=TOPK, group=group, bounds=bounds)
    for batch, next_n in STEPS:
        inputs = on(device, exact_inputs.paged(batch, next_n, CONTEXT, PAGE))
        for slots in (True, False):
            call = {"topk": TOPK, "group": group, "slots": slots, **KEEP[1]}
            found["paged", batch, slots] = distributed.index_select_paged_by_rows(**inputs, **call)
    return found


def by_position(group: Any, rank: int, world: int, device: str) -> dict:
    found = {}
    for name, each in shards(world).items():
        for batch, next_n in STEPS:
            inputs, kv_cache, q, sink = attended(batch, next_n)
            mine = on(device, exact_inputs.part_of(inputs, kv_cache, each[rank], PAGE))
            inputs, q, sink = on(device, (inputs, q, sink))
            call = {**inputs, "cache": mine["cache"], "page_table": mine["page_table"], "topk": TOPK, "shard": each[rank]}
            found["dealt", name, batch] = merged_by_rows({**call, "group": group})
            for number, keep in enumerate(KEEP):
                chosen = distributed.index_select_by_position(**call, group=group, **keep)
                for sinks in (None, sink):
                    out = distributed.sparse_attention_by_position(
                        *(q, mine["kv_cache"], chosen, mine["page_table"], 576**-0.5, each[rank]),
                        **{"page": PAGE, "group": group, "sink": sinks},
                    )
                    found[name, batch, number, sinks is not None] = (chosen, *out)
                if HEADS % world == 0:
                    found["own heads", name, batch, number] = distributed.sparse_attention_by_position(
                        *(q, mine["kv_cache"], chosen, mine["page_table"], 576**-0.5, each[rank]),
                        **{"page": PAGE, "group": group, "sink": sink, "own_heads": True},
                    )
    return found


def merged_by_rows(call: dict) -> torch.Tensor:
    """A choice by position, with the merge's rows dealt out to the ranks however few they are."""
    before, by_position_module.DEALT_BYTES = by_position_module.DEALT_BYTES, 0
    try:
        return distributed.index_select_by_position(**call)
    finally:
        by_position_module.DEALT_BYTES = before


def by_mode(group: Any, rank: int, world: int, device: str) -> dict:
    """The layer under every way of sharing its work."""
    found: dict = {}
    for tokens in TOKENS:
        step = on(device, prefill_step(tokens))
        for name, deal in deals(tokens, world).items():
            layer = dsa.Layer(MODEL, parallel=ContextParallel(deal, group=group, sms=100))
            found["context", tokens, name] = layer.prefill(**own_rows(step, deal, rank))
        if not tokens % world:
            layer = dsa.Layer(MODEL, parallel=ContextParallel("zigzag", group=group))
            found["context", tokens, "by name"] = layer.prefill(**own_rows(step, Deal.zigzag(tokens, world), rank))
        found["tensor", tokens] = tensor_parallel(group, rank, world).prefill(**of_heads(step, rank, world))
        if tokens == TOKENS[0]:
            deal = deals(tokens, world)[next(iter(deals(tokens, world)))]
            layer = dsa.Layer(MODEL, parallel=ContextParallel(deal, group=group), batch_invariant=True)
            found["invariant", tokens] = layer.prefill(**own_rows(step, deal, rank)), deal.rows(rank)
        counts = [tokens, *[0] * (world - 1)]
        mine = {name: value if rank == 0 or name not in OF_ROWS else value[:0] for name, value in step.items()}
        found["data", tokens] = dsa.Layer(MODEL, parallel=DataParallel(counts, group)).prefill(**mine)
    for batch, next_n in STEPS:
        step = decode_step(batch, next_n)
        moved = on(device, step)
        found["tensor paged", batch] = tensor_parallel(group, rank, world).decode(**of_heads(moved, rank, world))
        shard = Shard.interleaved(rank, world, PAGE)
        whole = {"cache": step["index_cache"], "page_table": step["page_table"], "max_context": CONTEXT}
        part = exact_inputs.part_of(whole, step["kv_cache"], shard, PAGE)
        part = on(device, {"index_cache": part["cache"], "kv_cache": part["kv_cache"], "page_table": part["page_table"]})
        found["context paged", batch] = dsa.Layer(MODEL, parallel=ContextParallel(group=group)).decode(**{**moved, **part})
        cuts = [batch * each // world for each in range(world)] + [batch]
        own = slice(cuts[rank], cuts[rank + 1])
        mine = {name: value[own].clone() if name in OF_SEQUENCES else value for name, value in moved.items()}
        counts = [cuts[each + 1] - cuts[each] for each in range(world)]
        found["data paged", batch] = dsa.Layer(MODEL, parallel=DataParallel(counts, group)).decode(**mine)
        found["data alone", batch] = dsa.Layer(MODEL, parallel=DataParallel()).decode(**mine), own.start
    return found


def by_module(group: Any, rank: int, world: int, device: str) -> dict:
    """The module under every way of sharing its work; heads are split where they divide among the ranks."""
    found: dict = {}
    fine = Shard.interleaved(rank, world, 8)
    ways: dict = {
        "pages": (ContextParallel("interleaved", group=group), False),
        "blocks": (ContextParallel("interleaved", shard=fine, group=group, sms=100), True),
        "data": (DataParallel(), True),
    }
    for name, parallel in {
        "own heads": ContextParallel("interleaved", shard=fine, group=group, own_heads=True),
        "tensor": TensorParallel(group, least=0),
    }.items():
        if not deepseek_layer.HEADS % world:
            ways[name] = parallel, False
            continue
        try:
            deepseek_layer.made(nn_model(), parallel)
        except dsa.errors.InputError as error:
            found[f"{name} refused"] = str(error)
    for name, (parallel, invariant) in ways.items():
        found[name] = deepseek_layer.shared_steps(parallel, invariant, device)
    found["everyone's"] = everyones(group, rank, world, device)
    return found


def everyones(group: Any, rank: int, world: int, device: str) -> torch.Tensor:
    """The rows of all ranks, of which the first has a sequence and the others have none."""
    counts = [9, *[0] * (world - 1)]
    parallel = DataParallel(counts, group)
    layer = deepseek_layer.made(nn_model(), parallel).to(device)
    table = nn.rotary_table(256, 64, device=device)
    caches = nn.PagedCache(layer.model, table, layers=1, blocks=1, batch=min(counts[rank], 1), parallel=parallel)
    step = caches.prefill([counts[rank]] if counts[rank] else [])
    return layer(deepseek_layer.hidden().to(device)[: counts[rank]], caches.layers[0], step)


def tensor_parallel(group: Any, rank: int, world: int) -> dsa.Layer:
    """The layer of a rank with some of the heads."""
    heads = heads_of(rank, world)
    model = Model.from_dict({**MODEL.to_dict(), "heads": heads.stop - heads.start})
    return dsa.Layer(model, parallel=TensorParallel(group, least=0))


def alone(device: str) -> dict:
    """What one rank computes, by the names of the cases above."""
    found: dict = {"rows": {}, "position": {}, "modes": {}}
    for queries, tokens in ROWS:
        inputs = on(device, exact_inputs.prefill(queries, tokens))
        for number, keep in enumerate(KEEP):
            found["rows"][queries, number] = dsa.index_select(**inputs, topk=TOPK, **keep)
    found["rows"]["bounds"] = found["rows"][26, 0]
    for batch, next_n in STEPS:
        inputs, kv_cache, q, sink = on(device, attended(batch, next_n))
        for slots in (True, False):
            found["rows"]["paged", batch, slots] = dsa.index_select_paged(**inputs, topk=TOPK, slots=slots, **KEEP[1])
        for number, keep in enumerate(KEEP):
            chosen = dsa.index_select_paged(**inputs, topk=TOPK, slots=False, **keep)
            slots = dsa.index_select_paged(**inputs, topk=TOPK, **keep)
            for sinks in (None, sink):
                out = dsa.sparse_attention_paged(q, kv_cache, slots, 576**-0.5, sink=sinks)
                found["position"][batch, number, sinks is not None] = (chosen, *out)
        found["modes"]["paged", batch] = dsa.Layer(MODEL).decode(**on(device, decode_step(batch, next_n)))
    for tokens in TOKENS:
        found["modes"]["prefill", tokens] = dsa.Layer(MODEL).prefill(**on(device, prefill_step(tokens)))
    for invariant in (False, True):
        found["modules", invariant] = deepseek_layer.shared_steps(None, invariant, device)
    step = on(device, prefill_step(TOKENS[0]))
    found["modes"]["invariant"] = dsa.Layer(MODEL, batch_invariant=True).prefill(**step)
    return found
