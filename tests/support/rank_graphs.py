"""Decode steps of a rank in CUDA graphs, collectives and all: what a replay gives on other inputs, and what a call gives."""

from __future__ import annotations

from typing import Any

import torch

import dsa_codegen as dsa
from dsa_codegen import nn
from dsa_codegen.distributed import ContextParallel, DataParallel, Shard, TensorParallel
from dsa_codegen.problem.draw import Draw

import deepseek_layer
import exact_inputs
from rank_cases import tensor_parallel
from rank_inputs import CONTEXT, MODEL, PAGE, STEPS, decode_step, nn_model, of_heads, on


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
