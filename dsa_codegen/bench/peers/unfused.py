"""The method in plain PyTorch operations, as one would write it first; only where it is not hopeless."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.caches import KvV32Layout
from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared, Run
from .base import Peer
from .listed_pages import requests_of, serves

_PAIRS = 1 << 23  # of query and token in the indexer: 64 heads of them take 6 ms on an H100
_GATHERED = {"attention_prefill": 1 << 20, "attention_decode": 1 << 14, "gqa": 1 << 21}
"""Latent vectors at once, 1.2 GB, or 8 sequences; keys, 0.5 GB."""
_D_V = 512


def _logits(inputs: Inputs) -> Run:
    q, key = inputs["q"].bfloat16(), inputs["k"].bfloat16()
    weights, k_scale = inputs["weights"], inputs["k_scale"]

    def run() -> Tensor:
        logits = torch.zeros(len(q), len(key), device=q.device)
        for head in range(q.shape[1]):
            logits += weights[:, head, None] * (q[:, head] @ key.T).relu()
        return logits * k_scale

    return run


def _attend(q: Tensor, latent: Tensor, sm_scale: float) -> Tensor:
    """bf16 [rows, heads, 512] of queries [rows, heads, d] and the latents that they chose [rows, topk, d]."""
    weights = (q @ latent.mT * sm_scale).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ latent[..., :_D_V]


def _prefill(inputs: Inputs) -> Run:
    q, kv, indices, sm_scale = inputs["q"], inputs["kv"][:, 0], inputs["indices"][:, 0], inputs["sm_scale"]
    return lambda: _attend(q, kv[indices], sm_scale)


def _decode(inputs: Inputs) -> Run:
    q, cache, indices, sm_scale = (inputs[name] for name in ("q", "cache", "indices", "sm_scale"))
    layout = KvV32Layout(cache.shape[1])

    def run() -> Tensor:
        latent = layout.dequantize(cache, indices.flatten(0, 1)).bfloat16()
        return _attend(q.flatten(0, 1), latent, sm_scale).view(*q.shape[:3], _D_V)

    return run


class GatheredSdpa(Peer):
    """Keys and values of the listed blocks copied together, then ``scaled_dot_product_attention``; some queries at a time."""

    name = "PyTorch (gathered, SDPA)"
    stages = ("gqa_prefill", "gqa_decode")
    distributions = ("torch",)

    def available(self) -> str | None:
        return None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not serves(case):
            return None
        x, shape, scale = requests_of(case, inputs), inputs["q"].shape, inputs["sm_scale"]
        step = max(1, _GATHERED["gqa"] // case["k"])

        def part(rows: slice) -> Tensor:
            pages = x.pages[rows]
            k, v = (cache[pages].flatten(1, 2).transpose(1, 2) for cache in (x.k, x.v))
            # The heads of a KV head are rows of one product: nothing is repeated.
            return torch.nn.functional.scaled_dot_product_attention(x.q[rows, None], k, v, scale=scale)

        def run() -> Tensor:
            return torch.cat([part(slice(first, first + step)) for first in range(0, len(x.q), step)])

        return Prepared(self.name, run, lambda out: {"out": out.reshape(shape)})


class Unfused(Peer):
    """See the module's first lines."""

    name = "PyTorch (unfused)"
    stages = ("indexer_prefill", "attention_prefill", "attention_decode")
    distributions = ("torch",)

    def available(self) -> str | None:
        return None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case.stage == "indexer_prefill":
            if case["queries"] * case["context"] > _PAIRS:
                return None
            return Prepared(self.name, _logits(inputs), lambda logits: {"logits": logits})
        rows = case["queries"] if case.stage == "attention_prefill" else case["batch"] * case["next_n"]
        v4 = case.stage == "attention_decode" and case["head_dim"] == 512
        if v4 or rows * case["k"] > _GATHERED[case.stage]:
            return None
        run = _prefill(inputs) if case.stage == "attention_prefill" else _decode(inputs)
        return Prepared(self.name, run, lambda out: {"out": out})


PEERS = (Unfused(), GatheredSdpa())
