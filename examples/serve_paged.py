"""Serving with paged caches: fill them from a prompt, then decode greedily, a step captured in a CUDA graph where there is one.

    python examples/serve_paged.py                       # the CPU reference, preset "tiny"
    python examples/serve_paged.py deepseek-v3.2 cuda    # tuned kernels

The model around the layer is left out: random activations stand for it. What an engine needs is here: caches as it allocates
them, a page table, slots of new tokens, lengths on the device, one warm-up, fixed shapes while a graph is in use.
"""

from __future__ import annotations

import sys

import torch

import dsa_codegen as dsa
from dsa_codegen.problem.kv_layouts import kv_layout

BATCH, PAGES, STEPS = 2, 4, 3


class Step:
    """The tensors of a decode step, which stay where they are."""

    def __init__(self, model: dsa.Model, device: str) -> None:
        self.model, self.layer = model, dsa.Layer(model)
        self.q = torch.zeros(BATCH, 1, model.heads, model.d_nope + model.d_rope, dtype=torch.bfloat16, device=device)
        self.index_q = torch.zeros(BATCH, 1, model.index_heads, model.index_head_dim, dtype=torch.bfloat16, device=device)
        self.index_weights = torch.zeros(BATCH, 1, model.index_heads, device=device)
        self.nope = torch.zeros(BATCH, model.d_nope, dtype=torch.bfloat16, device=device)
        self.rope = torch.zeros(BATCH, model.d_rope, dtype=torch.bfloat16, device=device)
        self.index_k = torch.zeros(BATCH, model.index_head_dim, dtype=torch.bfloat16, device=device)
        self.lengths = torch.zeros(BATCH, 1, dtype=torch.int32, device=device)
        # Page 0 of sequence 0, page 0 of sequence 1, page 1 of sequence 0, …: a sequence's pages need not be neighbours.
        self.page_table = torch.arange(BATCH * PAGES, dtype=torch.int32, device=device).view(PAGES, BATCH).T.contiguous()
        self.kv_cache = kv_layout(model.kv_layout, model.page).empty(BATCH * PAGES, device)
        shape = (BATCH * PAGES, model.page, 1, model.index_head_dim + 4)
        self.index_cache = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.sink = torch.zeros(model.heads, device=device) if model.attn_sink else None

    def slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where tokens [n] of every sequence lie: int64 [BATCH, n]."""
        return self.page_table[:, tokens // self.model.page].long() * self.model.page + tokens % self.model.page

    def store(self, nope: torch.Tensor, rope: torch.Tensor, index_k: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantise new tokens into both caches."""
        dsa.store_kv(nope, rope, slots, self.kv_cache, layout=self.model.kv_layout)
        dsa.store_index_k(index_k, slots, self.index_cache)

    def run(self) -> dsa.Attended:
        """Store the newest token of each sequence and attend from it; nothing here waits for the device."""
        last = (self.lengths - 1).long()
        page = self.page_table.gather(1, last // self.model.page)
        self.store(self.nope, self.rope, self.index_k, (page * self.model.page + last % self.model.page).flatten())
        queries = self.index_q, self.index_weights
        context = PAGES * self.model.page
        caches = self.index_cache, self.lengths, self.page_table, context
        return self.layer.decode(self.q, self.kv_cache, *queries, *caches, sink=self.sink)

    def draw(self) -> None:
        """What the model's projections would bring."""
        for tensor in (self.q, self.index_q, self.index_weights, self.nope, self.rope, self.index_k):
            tensor.normal_()


def main(preset: str = "tiny", device: str = "cpu") -> None:
    model = dsa.preset(preset)
    step = Step(model, device)
    prompt = torch.arange(2 * model.page + 5, device=device)  # both prompts have the same length here
    slots = step.slots(prompt).flatten()
    rows = {"dtype": torch.bfloat16, "device": device}
    widths = model.d_nope, model.d_rope, model.index_head_dim
    step.store(*(torch.randn(len(slots), width, **rows) for width in widths), slots)
    step.lengths.fill_(len(prompt))

    run = step.run
    if device == "cuda":
        step.layer.warmup(max_queries=0, max_batch=BATCH, max_context=PAGES * model.page)
        step.lengths.add_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attended = step.run()
        step.lengths.sub_(1)

        def run() -> dsa.Attended:
            graph.replay()
            return attended

    for number in range(STEPS):
        step.draw()
        step.lengths.add_(1)
        result = run()
        chosen = int((result.chosen >= 0).sum())
        print(f"step {number}: {int(step.lengths[0])} tokens each, {chosen} chosen, out {list(result.out.shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
