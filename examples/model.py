"""A model that imports the functions: a decoder of two layers whose attention is DeepSeek Sparse Attention, over one prompt.

    python examples/model.py                       # the CPU reference, preset "tiny"
    python examples/model.py deepseek-v3.2 cuda    # tuned kernels

The layer is written out, so that every call of the package is in sight; ``dsa_codegen.nn.SparseAttention`` is the same with
caches (examples/generate.py). Weights are random.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import dsa_codegen as dsa

HIDDEN, LAYERS, VOCABULARY, TOKENS = 256, 2, 100, 160


class Attention(nn.Module):
    """Queries, latents and the indexer's side from the residual stream; heads lie in the latent space."""

    def __init__(self, model: dsa.Model) -> None:
        super().__init__()
        self.model, self.d = model, model.d_nope + model.d_rope
        self.q = nn.Linear(HIDDEN, model.heads * self.d, bias=False)
        self.kv = nn.Linear(HIDDEN, self.d, bias=False)
        self.index_q = nn.Linear(HIDDEN, model.index_heads * model.index_head_dim, bias=False)
        self.index_k = nn.Linear(HIDDEN, model.index_head_dim, bias=False)
        self.index_weights = nn.Linear(HIDDEN, model.index_heads, bias=False)
        self.out = nn.Linear(model.heads * 512, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        model, queries = self.model, len(x)
        ends = torch.arange(1, queries + 1, dtype=torch.int32, device=x.device)  # causal
        index_q = self.index_q(x).view(queries, model.index_heads, model.index_head_dim)
        q8, weights = dsa.quantize_index_q(index_q, self.index_weights(x))
        k8, k_scale = dsa.quantize_index_k(self.index_k(x))
        chosen = dsa.index_select(q8, k8, k_scale, weights, torch.zeros_like(ends), ends, model.topk)
        q, kv = self.q(x).view(queries, model.heads, self.d), self.kv(x)[:, None]
        sink = torch.zeros(model.heads, device=x.device) if model.attn_sink else None
        attended, _ = dsa.sparse_attention(q, kv, chosen[:, None], self.d**-0.5, sink=sink)
        return self.out(attended.flatten(1))


class Decoder(nn.Module):
    """Embedding, layers, logits."""

    def __init__(self, model: dsa.Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(LAYERS))
        self.layers = nn.ModuleList(Attention(model) for _ in range(LAYERS))
        self.logits = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.logits(x)


def main(preset: str = "tiny", device: str = "cpu") -> None:
    torch.manual_seed(1)
    decoder = Decoder(dsa.preset(preset)).to(device, torch.bfloat16)
    logits = decoder(torch.randint(0, VOCABULARY, (TOKENS,), device=device))
    print(f"logits {list(logits.shape)}, the next token is {int(logits[-1].argmax())}")
    for what, count in dsa.stats().items():
        print(f"  {what}: {count}")


if __name__ == "__main__":
    main(*sys.argv[1:])
