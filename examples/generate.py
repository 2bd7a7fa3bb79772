"""Generating with ``nn.SparseAttention``: prompts prefilled in chunks over paged caches, then greedy decoding in a CUDA graph.

    python examples/generate.py                       # the CPU reference, preset "tiny"
    python examples/generate.py deepseek-v3.2 cuda    # tuned kernels, one captured decode step
    torchrun --nproc-per-node 2 examples/generate.py tiny cpu context    # caches sharded by position (tensor: heads split)

Two sequences of different lengths, two layers that share one page table. Weights are random; those of a checkpoint have the
names that ``load_state_dict`` expects.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import dsa_codegen as dsa
from dsa_codegen import distributed, nn

HIDDEN, LAYERS, VOCABULARY, STEPS = 128, 2, 100, 4
CHUNKS = [(40, 64), (40, 20), (10, 0)]
"""New tokens of each sequence by step of the prefill."""
MAX_CONTEXT = 256
Parallel = distributed.TensorParallel | distributed.ContextParallel


class Decoder(torch.nn.Module):
    """Embedding, layers, logits; tokens of all sequences lie one behind the other."""

    def __init__(self, model: dsa.Model, parallel: Parallel | None = None) -> None:
        super().__init__()
        shape = nn.Shape(hidden=HIDDEN, q_rank=64)
        self.embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(HIDDEN) for _ in range(LAYERS))
        self.logits = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        whole = [nn.SparseAttention(model, shape).state_dict() for _ in range(LAYERS)]
        self.layers = torch.nn.ModuleList(nn.SparseAttention(model, shape, parallel=parallel) for _ in range(LAYERS))
        for layer, state in zip(self.layers, whole, strict=True):
            layer.load_whole(state)  # of which a rank keeps its part

    @torch.no_grad()
    def forward(self, tokens: Tensor, caches: nn.PagedCache, step: nn.Step) -> Tensor:
        """[tokens, VOCABULARY]; under context parallelism a rank embeds, and works on, its rows of a prefill step."""
        dealt = step.shared.dealt if step.shared is not None else None
        x = self.embed(tokens if dealt is None else tokens[step.shared.rows])
        for norm, layer, cache in zip(self.norms, self.layers, caches.layers, strict=True):
            x = x + layer(norm(x), cache, step)
        logits = self.logits(x)
        return logits if dealt is None else distributed.gather_rows([logits], dealt).wait()[0]


def prefill(decoder: Decoder, caches: nn.PagedCache, prompts: list[Tensor]) -> Tensor:
    """The first new token of each sequence."""
    latest = torch.zeros(len(prompts), dtype=torch.int64, device=prompts[0].device)
    for counts in CHUNKS:
        parts = [prompt[held : held + count] for prompt, held, count in zip(prompts, caches.held, counts, strict=True)]
        logits = decoder(torch.cat(parts), caches, caches.prefill(counts))
        for sequence, rows in enumerate(logits.split(counts)):
            if len(rows):
                latest[sequence] = rows[-1].argmax()
    return latest


def captured(decoder: Decoder, caches: nn.PagedCache, latest: Tensor) -> Callable[[], None]:
    """A decode step as a CUDA graph, over the tokens in ``latest``: their successors take their place."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread of its own
        latest.copy_(decoder(latest, caches, caches.step(1, MAX_CONTEXT)).argmax(-1))
    return graph.replay


def parallel_of(mode: str, device: str) -> Parallel | None:
    """How the processes that torchrun started share the work."""
    if not mode:
        return None
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    heads_too = distributed.ContextParallel("interleaved", own_heads=True)
    return {"tensor": distributed.TensorParallel(), "context": heads_too}[mode]


def main(preset: str = "tiny", device: str = "cpu", mode: str = "") -> None:
    parallel = parallel_of(mode, device)
    torch.manual_seed(1)
    model = dsa.preset(preset)
    decoder = Decoder(model, parallel).to(device, torch.bfloat16)
    if device == "cuda":
        decoder.layers[0].warmup(max_queries=128, max_batch=2, max_context=MAX_CONTEXT, next_n=(1,))
    torch.manual_seed(2)
    table = nn.rotary_table(MAX_CONTEXT, 64, device=device)
    caches = nn.PagedCache(model, table, layers=LAYERS, blocks=8, batch=2, parallel=parallel)
    prompts = [torch.randint(0, VOCABULARY, (length,), device=device) for length in map(sum, zip(*CHUNKS, strict=True))]
    latest = prefill(decoder, caches, prompts)

    def eager() -> None:
        latest.copy_(decoder(latest, caches, caches.step(1, max(caches.held))).argmax(-1))

    run = eager
    for number in range(STEPS):
        caches.grow((1, 1))
        if device == "cuda" and not number:
            run = captured(decoder, caches, latest)
        run()
        if parallel is None or dist.get_rank() == 0:
            print(f"step {number}: tokens {latest.tolist()} behind {caches.held}")
    if parallel is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
