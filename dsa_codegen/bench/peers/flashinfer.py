"""FlashInfer's top-k (its choice of method, with a deterministic outcome, and CUB's), and its MLA over pages of one token."""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared, Run
from .base import Peer
from .libraries import imported, needs_gpu
from .listed_pages import requests_of, serves

_D_V = 512
_WORKSPACE = 128 << 20  # bytes, as its documentation recommends
_METHOD = "FLASHINFER_TOPK_ALGO"  # the variable that chooses one, read on every call
_LOWEST_INDEX = 1  # which of equals wins


def reason(capability: int = 80) -> str | None:
    """Why it cannot be used here."""
    found = needs_gpu(capability) or imported("flashinfer")
    return found if isinstance(found, str) else None


class FlashInferTopk(Peer):
    """Its selection.

    Args:
        same_set: whether its options promise the same set every time.
        method: which of its methods; its own choice where empty.
    """

    stages = ("select",)
    distributions = ("flashinfer-python",)
    ordered = False

    def __init__(self, name: str, same_set: bool, method: str = "", **options: Any) -> None:
        self.name, self.deterministic = name, same_set
        self._method, self._options = method, options

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return "FlashInfer", case.stage

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        library: Any = imported("flashinfer")
        scores, k, options = inputs["scores"], case["k"], self._options

        def run() -> Any:
            return library.top_k(scores, k, sorted=False, **options)

        run_it = _with_method(self._method, run) if self._method else run
        return Prepared(self.name, run_it, lambda result: {"chosen": result[1].int()})


def _with_method(method: str, run: Run) -> Run:
    """The same call with one of its methods, whatever the environment asks for otherwise."""

    def forced() -> Any:
        before = os.environ.get(_METHOD)
        os.environ[_METHOD] = method
        try:
            return run()
        finally:
            del os.environ[_METHOD]
            if before is not None:
                os.environ[_METHOD] = before

    return forced


class FlashInferMla(Peer):
    """Its MLA of BF16 latents: every query a request of its own, every token that it chose a page."""

    name = "FlashInfer MLA"
    stages = ("attention_prefill",)
    distributions = ("flashinfer-python",)

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case["head_dim"]

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        return Prepared(self.name, _attend(inputs["q"], inputs["kv"], inputs["indices"], inputs["sm_scale"]), _named)


class FlashInferGrouped(Peer):
    """Its decode over pages: every KV head of every query is a request, every block that it lists a page."""

    name = "FlashInfer, blocks as pages"
    stages = ("gqa_prefill", "gqa_decode")
    distributions = ("flashinfer-python",)

    def available(self) -> str | None:
        return reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case["head_dim"]

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not serves(case):
            return None
        library: Any = imported("flashinfer")
        x, shape = requests_of(case, inputs), inputs["q"].shape
        requests, entries = x.pages.shape
        ends = torch.arange(0, (requests + 1) * entries, entries, dtype=torch.int32, device=x.q.device)
        lengths = torch.full((requests,), case["block"], dtype=torch.int32, device=x.q.device)  # of a last page
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(_workspace(x.q.device), "NHD", use_tensor_cores=True)
        kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "sm_scale": inputs["sm_scale"]}
        wrapper.plan(ends, x.pages.flatten(), lengths, x.q.shape[1], 1, case["head_dim"], case["block"], **kinds)
        return Prepared(self.name, lambda: wrapper.run(x.q, (x.k, x.v)), lambda out: {"out": out.view(shape)})


def _attend(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float) -> Run:
    library: Any = imported("flashinfer")
    queries, heads, d = q.shape
    topk = indices.shape[2]
    each = torch.arange(queries + 1, dtype=torch.int32, device=q.device)
    lengths = torch.full((queries,), topk, dtype=torch.int32, device=q.device)
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(_workspace(q.device), backend="auto")
    wrapper.plan(
        each, each * topk, indices.flatten(), lengths, heads, _D_V, d - _D_V, 1, False, sm_scale, torch.bfloat16, torch.bfloat16
    )
    parts = q[..., :_D_V].contiguous(), q[..., _D_V:].contiguous(), kv[..., :_D_V], kv[..., _D_V:]
    return lambda: wrapper.run(*parts, return_lse=False)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Shared by all calls: they follow one another on a stream."""
    return torch.empty(_WORKSPACE, dtype=torch.int8, device=device)


def _named(out: Tensor) -> dict[str, Tensor]:
    return {"out": out}


PEERS = (
    FlashInferTopk("FlashInfer", False),
    FlashInferTopk("FlashInfer (deterministic)", True, deterministic=True),
    FlashInferTopk("CUB (lowest index)", True, "cub", tie_break=_LOWEST_INDEX),
    FlashInferMla(),
    FlashInferGrouped(),
)
