"""FlashAttention 3 over pages of one token, as vLLM serves sparse MLA on Hopper: BF16 latents, any number of heads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..models import model_of
from ..stage import Prepared, Run
from .base import Peer
from .gathered_latents import STAGES, read_back, rows_of
from .libraries import loaded, needs_gpu
from .listed_pages import requests_of, serves

LIBRARY = "vllm_flash_attn/_vllm_fa3_C.*so"
_D_V = 512
_HEAD_DIM = 576
_WIDEST = 256  # channels of a key that it takes whole
_NO_WINDOW = -1


class Fa3(Peer):
    """Every query is a request of its own, every token that it chose a page."""

    name = "FA3 (vLLM)"
    stages = ("attention_prefill",)
    distributions = ("vllm",)

    def available(self) -> str | None:
        return needs_gpu(90) or loaded("vllm", LIBRARY, "vllm")

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case["head_dim"] != _HEAD_DIM:
            return None
        run = _attend(inputs["q"], inputs["kv"], inputs["indices"], inputs["sm_scale"])
        return Prepared(self.name, run, lambda results: {"out": results[0]})


class Fa3Grouped(Peer):
    """Every KV head of every query is a request, every block that it lists a page."""

    name = "FA3 (vLLM), blocks as pages"
    stages = ("gqa_prefill", "gqa_decode")
    distributions = ("vllm",)

    def available(self) -> str | None:
        return needs_gpu(90) or loaded("vllm", LIBRARY, "vllm")

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not serves(case):
            return None
        x, shape = requests_of(case, inputs), inputs["q"].shape
        run = _call(x.q, x.k, x.v, None, x.pages, case["k"], inputs["sm_scale"])
        return Prepared(self.name, run, lambda results: {"out": results[0].view(shape)})


class Fa3Models(Peer):
    """Every row a request, every token that it chose a page of one: latents that are BF16 rows, without sinks."""

    name = "FA3 (vLLM), tokens as pages"
    stages = STAGES
    distributions = ("vllm",)

    def available(self) -> str | None:
        return needs_gpu(90) or loaded("vllm", LIBRARY, "vllm")

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        model = model_of(case)
        split = (model.d_qk, model.d_v) == (_HEAD_DIM, _D_V)
        rows = "kv" in inputs or model.kv_layout == "bf16"
        if not rows or inputs["sink"] is not None or inputs["lengths"] is not None or not (split or model.d_qk <= _WIDEST):
            return None
        (q, lists), kv = rows_of(inputs), read_back(model, inputs)[:, None]
        attend = _attend if split else functools.partial(_whole, model.d_v)
        run, shape = attend(q, kv, lists[:, None], inputs["sm_scale"]), (*inputs["q"].shape[:-1], model.d_v)
        return Prepared(self.name, run, lambda results: {"out": results[0].view(shape)})


def _whole(d_v: int, q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float) -> Run:
    """Latents narrow enough for the kernel to take them in one piece."""
    return _call(q, kv[:, None], kv[:, None, :, :d_v], None, indices.flatten(1), indices.shape[2], sm_scale)


def _attend(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float) -> Run:
    nope, rope = q[..., :_D_V].contiguous(), q[..., _D_V:].contiguous()
    value, key = kv[:, None, :, :_D_V], kv[:, None, :, _D_V:]
    return _call(rope, key, value, nope, indices.flatten(1), indices.shape[2], sm_scale)


def _call(q: Tensor, key: Tensor, value: Tensor, qv: Tensor | None, pages: Tensor, tokens: int, sm_scale: float) -> Run:
    """One query a request, each of so many tokens."""
    each = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    lengths = torch.full((len(q),), tokens, dtype=torch.int32, device=q.device)
    attend = torch.ops._vllm_fa3_C.fwd.default
    new = (None, None)  # keys and values
    used = (each, None, None, None, lengths, 1, tokens)  # queries, keys and new keys by request; used queries and keys; longest
    paged = (pages, None, None, None, None, None)  # table, batches, padding, rotary cosines, sines and lengths
    scales = (None, None, None, sm_scale)
    masked = (True, _NO_WINDOW, _NO_WINDOW, 0.0, True)  # causal: with one query at the end of its request nothing is cut off
    rest = (None, 0, None, 0, None, 1, 0, None)  # schedule, splits, packing, margin, sinks, ranks
    return lambda: attend(q, key, value, *new, qv, None, *used, *paged, *scales, *masked, *rest)


PEERS = (Fa3(), Fa3Grouped(), Fa3Models())
