"""Four processes of one gloo group compute every case in groups of two and of four, and save what each rank got.

Run as a script with a folder: torch is imported once, then processes fork.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import dsa_codegen as dsa
from dsa_codegen import distributed
from dsa_codegen.distributed import Shard
from dsa_codegen.problem.caches import KvV32Layout
from dsa_codegen.problem.draw import Draw

import exact_inputs

TOPK, PAGE, CONTEXT, HEADS = 64, 16, 290, 8
WORLDS = (2, 4)
ROWS = [(26, 300), (3, 300), (1, 40), (0, 40)]
KEEP = [{}, {"keep_first": 3, "keep_recent": 9}]
STEPS = [(5, 2), (1, 1), (0, 1)]


def shards(world: int) -> dict[str, list[Shard]]:
    """By name, the shard of each rank: dealt out token by token, page by page, or cut into stretches, the last of none."""
    cuts = [0, 40, 41, CONTEXT, CONTEXT] if world == 4 else [0, CONTEXT, CONTEXT]
    return {
        "tokens": [Shard.interleaved(rank, world) for rank in range(world)],
        "pages": [Shard.interleaved(rank, world, PAGE) for rank in range(world)],
        "stretches": [Shard.stretch(cuts[rank], cuts[rank + 1] - cuts[rank]) for rank in range(world)],
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


def by_rows(group: dist.ProcessGroup, world: int) -> dict:
    found = {}
    for queries, tokens in ROWS:
        inputs = exact_inputs.prefill(queries, tokens)
        for number, keep in enumerate(KEEP):
            found[queries, number] = distributed.index_select_by_rows(**inputs, topk=TOPK, group=group, **keep)
    bounds = [0, 0, 7, 7, 26] if world == 4 else [0, 0, 26]  # ranks with none
    found["bounds"] = distributed.index_select_by_rows(**exact_inputs.prefill(26, 300), topk=TOPK, group=group, bounds=bounds)
    return found


def by_position(group: dist.ProcessGroup, rank: int, world: int) -> dict:
    found = {}
    for name, each in shards(world).items():
        for batch, next_n in STEPS:
            inputs, kv_cache, q, sink = attended(batch, next_n)
            mine = exact_inputs.part_of(inputs, kv_cache, each[rank], PAGE)
            call = {**inputs, "cache": mine["cache"], "page_table": mine["page_table"], "topk": TOPK, "shard": each[rank]}
            for number, keep in enumerate(KEEP):
                chosen = distributed.index_select_by_position(**call, group=group, **keep)
                for sinks in (None, sink):
                    out = distributed.sparse_attention_by_position(
                        *(q, mine["kv_cache"], chosen, mine["page_table"], 576**-0.5, each[rank]),
                        **{"page": PAGE, "group": group, "sink": sinks},
                    )
                    found[name, batch, number, sinks is not None] = (chosen, *out)
    return found


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 4), rank=rank, world_size=4)
    found = {}
    for world in WORLDS:
        group = dist.new_group(range(world))
        if rank < world:
            found[world] = {"rows": by_rows(group, world), "position": by_position(group, rank, world)}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, Path(sys.argv[1]))) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
