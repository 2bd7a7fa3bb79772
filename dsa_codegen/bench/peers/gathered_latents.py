"""The chosen latents copied together, then plain PyTorch: what serves a shape for which nobody has a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...problem.kv_layouts import kv_layout
from ...problem.op import Inputs
from ...problem.presets import NO_CACHE, Model
from ..cases import BenchCase
from ..models import model_of
from ..stage import Prepared
from .base import Peer

STAGES = ("model_prefill", "model_decode")
_GATHERED = 1 << 20
"""Latent vectors at once, of 512 channels 1 GB."""
_FILL = 1 << 18  # slots that are read back at once


def read_back(model: Model, inputs: Inputs) -> Tensor:
    """bf16 [slots, d_qk]: every token of the cache, as an engine that keeps it in BF16 would have it; latents as they are."""
    if "kv" in inputs:
        return inputs["kv"][:, 0]
    cache = inputs["cache"]
    if model.kv_layout == "bf16":
        return cache.flatten(0, 2)
    layout = model.cache
    slots = torch.arange(cache.shape[0] * model.page, device=cache.device)
    return torch.cat([layout.dequantize(cache, part).bfloat16() for part in slots.split(_FILL)])


def rows_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries [rows, heads, d] and lists [rows, k] of a prompt or of a step."""
    q, indices = inputs["q"], inputs["indices"]
    return q.flatten(0, -3), indices.flatten(0, 1)


def _attend(q: Tensor, latents: Tensor, missing: Tensor | None, sink: Tensor | None, sm_scale: float, d_v: int) -> Tensor:
    """bf16 [rows, heads, d_v] of queries and the latents [rows, k, d] that they chose."""
    scores = q @ latents.mT * sm_scale
    if missing is not None:
        scores = scores.masked_fill(missing[:, None], float("-inf"))
    if sink is not None:
        column = sink.to(scores.dtype)[:, None].expand(len(q), -1, 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : latents.shape[1]] @ latents[..., :d_v]


def _fused(q: Tensor, latents: Tensor, sm_scale: float, d_v: int) -> Tensor:
    k = latents[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q[:, None], k, k[..., :d_v], scale=sm_scale)[:, 0]


class GatheredLatents(Peer):
    """See the module's first lines; some rows at a time.

    Args:
        fused: by ``scaled_dot_product_attention``, which knows no sinks, and whole lists alone.
    """

    stages = STAGES
    distributions = ("torch",)

    def __init__(self, fused: bool) -> None:
        self.name = "PyTorch (gathered latents, SDPA)" if fused else "PyTorch (gathered latents)"
        self._fused = fused

    def available(self) -> str | None:
        return None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        model, sink = model_of(case), inputs["sink"]
        short = inputs["lengths"] is not None
        if self._fused and (sink is not None or short):
            return None
        (q, lists), gather = rows_of(inputs), _reader(model, inputs)
        shape, scale = (*inputs["q"].shape[:-1], model.d_v), inputs["sm_scale"]
        step = max(1, _GATHERED // lists.shape[1])

        def part(rows: slice) -> Tensor:
            latents = gather(lists[rows].clamp(min=0) if short else lists[rows])
            if self._fused:
                return _fused(q[rows], latents, scale, model.d_v)
            return _attend(q[rows], latents, lists[rows] < 0 if short else None, sink, scale, model.d_v)

        def run() -> Tensor:
            return torch.cat([part(slice(first, first + step)) for first in range(0, len(q), step)])

        return Prepared(self.name, run, lambda out: {"out": out.view(shape)})


def _reader(model: Model, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """What reads the latents of lists [rows, k], of a quantised cache by plain operations."""
    if "kv" in inputs or model.kv_layout in ("bf16", NO_CACHE):
        rows = read_back(model, inputs)
        return lambda lists: rows[lists]
    layout, cache = kv_layout(model.kv_layout, model.page, model.d_nope, model.d_rope, model.d_v), inputs["cache"]
    return lambda lists: layout.dequantize(cache, lists).bfloat16()


PEERS = (GatheredLatents(True), GatheredLatents(False))
