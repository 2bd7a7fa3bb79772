"""cuDNN-frontend's FP8 indexer, deterministic top-k and backward of sparse MLA: CuTe-DSL kernels, compiled at run time."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import IN_ORDER, BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import imported, needs_gpu

MODULE = "cudnn.deepseek_sparse_attention"
HEADS = (32, 64)
HEAD_DIM = 128
TOPK = 2048
"""At most so many."""


def reason() -> str | None:
    """Why it cannot be used here."""
    found = needs_gpu(90) or imported(MODULE)
    return found if isinstance(found, str) else None


class CudnnIndexer(Peer):
    """Causal windows only. It fills the scores with -inf before its kernel writes them, which is part of its call."""

    name = "cuDNN indexer"
    stages = ("indexer_prefill",)
    distributions = ("nvidia-cudnn-frontend",)

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return (self.name, case["heads"], case["queries"] % 4) if case["heads"] in HEADS else None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case["heads"] not in HEADS or case["head_dim"] != HEAD_DIM or case.distribution != "causal":
            return None
        library: Any = imported(MODULE)
        # A batch of one. The weights hold the queries' scales already; such weights are taken as they are.
        q, weights = inputs["q"][None], inputs["weights"][None]
        k, k_scale = inputs["k"][None, :, None], inputs["k_scale"][None, :, None]
        first = torch.full((1,), case["context"] - case["queries"], dtype=torch.int32, device=q.device)
        scales = {"q_scale": torch.ones_like(weights), "k_scale": k_scale}
        options = {"ratio": 1, "precision": "fp8", "q_causal_offsets": first, **scales}
        return Prepared(
            self.name,
            lambda: library.indexer_forward_wrapper(q, k, weights, **options),
            lambda result: {"logits": result["scores"][0]},
        )


class CudnnTopk(Peer):
    """Compiled, with its scratch memory, beforehand; the chosen tokens ascend, and of equals the lowest win."""

    name = "cuDNN top-k (deterministic)"
    stages = ("select",)
    distributions = ("nvidia-cudnn-frontend",)
    deterministic = True
    ordered = True

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case["context"]

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        scores, ends, topk = inputs["scores"], inputs["ends"], case["k"]
        if topk > TOPK:
            return None
        library: Any = imported(MODULE)
        plan = library.IndexerTopK(scores, ends, topk, return_val=False, deterministic=True)
        plan.check_support()
        plan.compile()
        workspace = _workspace(plan.scratch_workspace_bytes(), scores.device)
        chosen = torch.empty(len(scores), topk, dtype=torch.int32, device=scores.device)
        return Prepared(
            self.name,
            lambda: plan.execute(scores, ends, out_indices=chosen, workspace=workspace),
            lambda result: {"chosen": result[0]},
        )


class CudnnBackward(Peer):
    """Tokens' gradients are sums by atomics on Hopper. Lists say how many of their entries are tokens, as its users' do."""

    name = "cuDNN backward"
    stages = ("attention_backward",)
    distributions = ("nvidia-cudnn-frontend",)
    deterministic = False

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case["heads"], case["head_dim"], case["k"]

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case.distribution == IN_ORDER or case["heads"] < 2:
            return None
        given, results = _of_backward(inputs)
        library: Any = imported(MODULE)
        plan = library.SparseAttentionBackward(
            **{f"sample_{name}": value for name, value in given.items()}, softmax_scale=inputs["sm_scale"]
        )
        plan.check_support()
        plan.compile()
        workspace = _workspace(plan.scratch_workspace_bytes(), given["q"].device)
        return Prepared(
            self.name,
            lambda: plan.execute(**given, **results, workspace=workspace),
            lambda found: {"dq": found[0], "dkv": found[1][:, None]},
        )


def _of_backward(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Its arguments, without a head of kv, and what it writes; a sink of no weight stands for none."""
    q, kv, indices = inputs["q"], inputs["kv"][:, 0], inputs["indices"][:, 0]
    sink = torch.full(q.shape[1:2], -math.inf, dtype=torch.float32, device=q.device)
    given = {"q": q, "kv": kv, "out": inputs["out"], "dout": inputs["do"], "lse": inputs["lse"], "attn_sink": sink}
    lists = {"topk_idxs": indices, "topk_length": (indices >= 0).sum(1, dtype=torch.int32)}
    return {**given, **lists}, {"dq": torch.empty_like(q), "dkv": torch.empty_like(kv), "d_sink": torch.empty_like(sink)}


@functools.lru_cache(maxsize=1)
def _workspace(size: int, device: torch.device) -> Tensor:
    """Shared by the calls of a case: they follow one another on a stream."""
    return torch.empty(size, dtype=torch.uint8, device=device)


PEERS = (CudnnIndexer(), CudnnTopk(), CudnnBackward())
