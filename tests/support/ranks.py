"""Starts the processes of a group, of which each computes every case in groups of several sizes, and collects what each got.

Run as a script: a folder, how many processes, and the transport (gloo on the CPU, nccl with a GPU each). Over gloo torch is
imported once, then processes fork.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock

import deepseek_layer
from rank_cases import alone, by_mode, by_module, by_position, by_rows
from rank_graphs import captured, captured_modules
from rank_inputs import on, worlds


def computed(folder: Path, processes: int, transport: str = "gloo") -> dict[int, list[dict]]:
    """World -> the results of each rank; world 1 is one rank alone, without a group.

    Args:
        folder: where they are kept. One process of a test run starts the group, others wait for it: its ranks keep two cores
            busy for 15 s.
    """
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            launch(folder, processes, transport)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    return {world: [found[rank][world] for rank in range(world)] for world in [1, *worlds(processes)]}


def launch(folder: Path, processes: int, transport: str) -> None:
    """Have a group compute every case; the folder is there when all ranks have ended well."""
    here, place = Path(__file__).resolve(), tempfile.mkdtemp(dir=folder.parent)
    paths = [str(here.parents[2]), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    if transport == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(here), place, str(processes), transport]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    Path(place).rename(folder)


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
