"""Sparse attention of grouped queries: a prompt and ten steps over paged caches, with blocks chosen for each KV head.

    python examples/grouped_queries.py             # no GPU: the references run
    python examples/grouped_queries.py tiny cuda   # a GPU: the kernels do
    python examples/grouped_queries.py minimax-m3 cuda

The indexer is that of MiniMax-M3: one head for each KV head, whose score of a block is its highest product with a key there;
the query's own block is always chosen. With as many blocks as there are the result is that of dense attention: compared.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import dsa_codegen as dsa
from dsa_codegen import Model


def choose(index_q: Tensor, index_k: Tensor, ends: Tensor, entries: int, block: int) -> Tensor:
    """int32 [queries, kv_heads, entries]: the blocks with the highest scores; index_q [queries, kv_heads, d]."""
    queries, kv_heads, _ = index_q.shape
    scores = (index_q.flatten(0, 1) @ index_k.T).float()
    seen = torch.arange(len(index_k), device=ends.device) < ends.repeat_interleave(kv_heads)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    scores = torch.nn.functional.pad(scores, (0, -len(index_k) % block), value=-torch.inf)
    blocks = scores.unflatten(1, (-1, block)).amax(2)  # rows are queries and KV heads, columns blocks
    last = ((ends + block - 1) // block).repeat_interleave(kv_heads).int()
    return dsa.select(blocks, last, entries, keep_recent=1).unflatten(0, (queries, kv_heads))


class Cache:
    """One sequence's keys, values and index keys; the page table names its pages, in any order."""

    def __init__(self, model: Model, tokens: int, **made: object) -> None:
        self.model, self.held = model, 0
        pages, width = -(-tokens // model.page), model.d_nope + model.d_rope
        self.table = torch.randperm(pages).int()[None].to(made["device"])
        self.k, self.v = torch.zeros(2, pages, model.page, model.kv_heads, width, **made)
        self.index_k = torch.zeros(tokens, model.index_head_dim, **made)

    def append(self, k: Tensor, v: Tensor, index_k: Tensor) -> Tensor:
        """Store new tokens; int32 [tokens], how many tokens each of them sees."""
        place = torch.arange(self.held, self.held + len(k), device=k.device)
        at = self.table[0, place // self.model.page].long(), place % self.model.page
        self.k[at], self.v[at], self.index_k[place] = k, v, index_k
        self.held += len(k)
        return (place + 1).int()


def attend(model: Model, cache: Cache, q: Tensor, index_q: Tensor, ends: Tensor) -> Tensor:
    """[queries, heads, d] of a sequence's newest queries."""
    chosen = choose(index_q, cache.index_k[: cache.held], ends, model.topk // model.block, model.block)
    one = (each[None] for each in (q, chosen, ends))  # a batch of one sequence
    q, chosen, ends = one
    out, _ = dsa.sparse_attention_gqa_paged(
        q, cache.k, cache.v, chosen, cache.table, q.shape[-1] ** -0.5, block=model.block, ends=ends
    )
    return out[0]


def dense(cache: Cache, q: Tensor, ends: Tensor) -> Tensor:
    """The same over all tokens."""
    k, v = (each[cache.table[0].long()].flatten(0, 1)[: cache.held].float() for each in (cache.k, cache.v))
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, 1).transpose(0, 1) for each in (k, v))
    seen = torch.arange(cache.held, device=q.device) < ends[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q.float().transpose(0, 1), k, v, seen).transpose(0, 1)


def main(preset: str = "tiny-gqa", device: str = "cpu") -> None:
    model = dsa.preset("tiny-gqa" if preset == "tiny" else preset)
    made = {"dtype": torch.bfloat16, "device": device}
    width, prompt, steps = model.d_nope + model.d_rope, model.topk, 10

    def new(tokens: int) -> tuple[Tensor, ...]:
        shapes = (model.heads, width), (model.kv_heads, width), (model.kv_heads, width), (model.kv_heads, model.index_head_dim)
        return *(torch.randn(tokens, *shape, **made) for shape in shapes), torch.randn(tokens, model.index_head_dim, **made)

    cache = Cache(model, prompt + steps, **made)
    q, k, v, index_q, index_k = new(prompt)
    ends = cache.append(k, v, index_k)
    out = attend(model, cache, q, index_q, ends)  # of a prompt of topk tokens every block is chosen
    print(f"{prompt} tokens: {float((out.float() - dense(cache, q, ends)).abs().max()):.4f} from dense attention")
    for _ in range(steps):
        q, k, v, index_q, index_k = new(1)
        ends = cache.append(k, v, index_k)
        out = attend(model, cache, q, index_q, ends)
    print(f"{cache.held} tokens: {float((out.float() - dense(cache, q, ends)).abs().max()):.4f}, {model.topk} of them read")


if __name__ == "__main__":
    main(*sys.argv[1:])
