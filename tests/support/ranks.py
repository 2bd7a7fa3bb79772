"""Processes of one group compute every case in groups of several sizes, and save what each got, and what one gets alone.

Run as a script: a folder, how many processes, and the transport (gloo on the CPU, nccl with a GPU each). Over gloo torch is
imported once, then processes fork.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dsa_codegen as dsa
from dsa_codegen import distributed, nn
from dsa_codegen.distributed import ContextParallel, DataParallel, Deal, Shard, TensorParallel
from dsa_codegen.distributed import by_position as by_position_module
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


def launch(folder: Path, processes: int, transport: str = "gloo") -> dict[int, list[dict]]:
    """World -> the results of each rank; world 1 is one rank alone, without a group."""
    here = Path(__file__).resolve()
    paths = [str(here.parents[2]), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    if transport == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(here), str(folder), str(processes), transport]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    return {world: [found[rank][world] for rank in range(world)] for world in [1, *worlds(processes)]}


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


def own_rows(step: dict, deal: Deal, rank: int) -> dict:
    """The rank's part of a step."""
    return {name: value if name == "sink" else deal.own(value, rank) for name, value in step.items()}


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


def nn_model() -> Model:
    """Of the module's tests."""
    return Model("v3.2", deepseek_layer.HEADS, 512, 64, deepseek_layer.INDEX_HEADS, deepseek_layer.INDEX_DIM, TOPK)


def everyones(group: Any, rank: int, world: int, device: str) -> torch.Tensor:
    """The rows of all ranks, of which the first has a sequence and the others have none."""
    counts = [9, *[0] * (world - 1)]
    parallel = DataParallel(counts, group)
    layer = deepseek_layer.made(nn_model(), parallel).to(device)
    table = nn.rotary_table(256, 64, device=device)
    caches = nn.PagedCache(layer.model, table, layers=1, blocks=1, batch=min(counts[rank], 1), parallel=parallel)
    step = caches.prefill([counts[rank]] if counts[rank] else [])
    return layer(deepseek_layer.hidden().to(device)[: counts[rank]], caches.layers[0], step)


def captured_modules(group: Any, rank: int, world: int, device: str) -> dict:
    """A module's decode steps, replayed from a CUDA graph and called one by one, on sequences that grow alike."""
    found: dict = {}
    x = deepseek_layer.hidden().to(device)
    for name, parallel in {
        "context": ContextParallel("interleaved", shard=Shard.interleaved(rank, world, 8), group=group, own_heads=True),
        "tensor": TensorParallel(group, least=0),
    }.items():
        layer, table = deepseek_layer.made(nn_model(), parallel).to(device), nn.rotary_table(256, 64, device=device)
        replayed, called = (
            nn.PagedCache(layer.model, table, layers=1, blocks=8, batch=2, max_context=128, parallel=parallel) for _ in range(2)
        )
        for caches in (replayed, called):
            step = caches.prefill((70, 70))
            layer(x if step.shared is None else x[step.shared.rows], caches.layers[0], step)
            caches.grow((1, 1))
            layer(x[:2], caches.layers[0], caches.step(1, 128))  # loads the kernels, and makes NCCL ready
        given, graph = x[:2].clone(), torch.cuda.CUDAGraph()
        replayed.grow((1, 1))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = layer(given, replayed.layers[0], replayed.step(1, 128))
        for number in range(3):
            given.copy_(x[2 + number : 4 + number])
            if number:
                replayed.grow((1, 1))
            graph.replay()
            called.grow((1, 1))
            found[name, number] = result.clone(), layer(given, called.layers[0], called.step(1, 128))
    return found


def captured(group: Any, rank: int, world: int, device: str) -> dict:
    """Decode steps in CUDA graphs, collectives and all: what a replay gives on other inputs, and what a call gives.

    Under data parallelism the last rank has no sequence: it replays the graph of as many, of length 0.
    """
    found: dict = {}
    batch, next_n = STEPS[0]
    step = decode_step(batch, next_n)
    moved = on(device, step)
    shard = Shard.interleaved(rank, world, PAGE)
    whole = {"cache": step["index_cache"], "page_table": step["page_table"], "max_context": CONTEXT}
    part = exact_inputs.part_of(whole, step["kv_cache"], shard, PAGE)
    part = on(device, {"index_cache": part["cache"], "kv_cache": part["kv_cache"], "page_table": part["page_table"]})
    ways = {
        "tensor": (tensor_parallel(group, rank, world), of_heads(moved, rank, world)),
        "context": (dsa.Layer(MODEL, parallel=ContextParallel(group=group)), {**moved, **part}),
        "data": (dsa.Layer(MODEL, parallel=DataParallel([batch] * world, group)), dict(moved)),
    }
    for name, (layer, inputs) in ways.items():
        inputs["lengths"] = inputs["lengths"].clone()
        layer.decode(**inputs)  # loads the kernels, and makes NCCL ready
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            replayed = layer.decode(**inputs)
        for number in range(2):
            lengths = Draw(20 + number).integers(0, CONTEXT + 1, batch, next_n)
            inputs["lengths"].copy_(lengths * 0 if name == "data" and rank == world - 1 else lengths)
            graph.replay()
            torch.cuda.synchronize()
            again = [each.clone() for each in replayed]
            found[name, number] = again, list(layer.decode(**inputs))
    return found


OF_ROWS = ("q", "index_q", "index_weights", "starts", "ends")
OF_SEQUENCES = ("q", "index_q", "index_weights", "lengths", "page_table")


def tensor_parallel(group: Any, rank: int, world: int) -> dsa.Layer:
    """The layer of a rank with some of the heads."""
    heads = heads_of(rank, world)
    model = Model.from_dict({**MODEL.to_dict(), "heads": heads.stop - heads.start})
    return dsa.Layer(model, parallel=TensorParallel(group, least=0))


def heads_of(rank: int, world: int) -> slice:
    """The rank's, at least one."""
    return slice(HEADS * rank // world, HEADS * (rank + 1) // world)


def of_heads(step: dict, rank: int, world: int) -> dict:
    """The step with the rank's heads."""
    heads = heads_of(rank, world)
    return {**step, "q": step["q"][..., heads, :].contiguous(), "sink": step["sink"][heads].clone()}


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


def run(rank: int, folder: Path, processes: int, transport: str) -> None:
    torch.set_num_threads(1)
    device = "cpu"
    if transport == "nccl":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(transport, store=store, rank=rank, world_size=processes)
    found: dict = {1: alone(device)} if rank == 0 else {}
    for world in worlds(processes):
        group = dist.new_group(range(world))
        if rank < world:
            found[world] = {
                "rows": by_rows(group, world, device),
                "position": by_position(group, rank, world, device),
                "modes": by_mode(group, rank, world, device),
                "modules": by_module(group, rank, world, device),
                "module": None if deepseek_layer.HEADS % world else deepseek_layer.steps_of_module(group, world, device),
                "captured": captured(group, rank, world, device) if transport == "nccl" else {},
                "captured modules": captured_modules(group, rank, world, device) if transport == "nccl" else {},
            }
    torch.save(on("cpu", found), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    place, count, transport = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    context = multiprocessing.get_context("fork" if transport == "gloo" else "spawn")
    ranks = [context.Process(target=run, args=(rank, place, count, transport)) for rank in range(count)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        for process in ranks:
            process.join(0.1)
        if any(process.exitcode for process in ranks):  # the others would wait for it
            for process in ranks:
                process.kill()
    sys.exit(any(process.exitcode for process in ranks))
