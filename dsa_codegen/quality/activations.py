"""Activations: the queries, latents and indexer's inputs of one layer, on which the quality of choices is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, SpecError
from ..problem import checks
from ..problem.draw import Draw
from ..problem.presets import Model

_FLOATS = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Activations:
    """One layer's inputs, of queries that all belong to one context.

    Args:
        q: [queries, heads, d], d 576 (512 + 64 rotary) or 512; bf16, on the CPU also fp32.
        kv: [tokens, 1, d] of the same dtype; the first 512 channels are the value.
        index_q: [queries, index_heads, index_head_dim] of the same dtype, not quantised.
        index_k: [tokens, index_head_dim] of the same dtype, not quantised.
        index_weights: fp32 [queries, index_heads], not scaled (as ``Layer.prefill`` takes them).
        starts, ends: int32 [queries], the window of each query.
        sm_scale: factor of the attention's scores.
        sink: fp32 [heads], or None.
        name: what tables and pictures call them.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """

    q: Tensor
    kv: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    starts: Tensor
    ends: Tensor
    sm_scale: float
    sink: Tensor | None = None
    name: str = "activations"

    def __post_init__(self) -> None:
        q = checks.tensor("q", self.q, (None, None, None), _FLOATS)
        queries, tokens = len(q), len(self.kv)
        checks.tensor("kv", self.kv, (None, 1, q.shape[-1]), q.dtype, like=q)
        index_q = checks.tensor("index_q", self.index_q, (queries, None, None), q.dtype, like=q)
        checks.tensor("index_k", self.index_k, (tokens, index_q.shape[-1]), q.dtype, like=q)
        checks.tensor("index_weights", self.index_weights, (queries, index_q.shape[1]), torch.float32, like=q)
        for name in ("starts", "ends"):
            checks.tensor(name, getattr(self, name), (queries,), torch.int32, like=q)
        checks.check_kind("sm_scale", self.sm_scale, "float")
        if self.sink is not None:
            checks.tensor("sink", self.sink, (q.shape[1],), torch.float32, like=q)

    @property
    def context(self) -> int:
        """Tokens of the longest window."""
        return int((self.ends.clamp(0, len(self.kv)) - self.starts.clamp(min=0)).max()) if len(self.q) else 0

    def until(self, context: int, queries: int) -> Activations:
        """The last ``queries`` of those whose window has at most ``context`` tokens: the same layer at a shorter context.

        Raises:
            InputError: no query has so short a window.
        """
        length = self.ends - self.starts
        able = (length <= context).nonzero()[:, 0]
        if not len(able):
            raise InputError("context", context, f"at least {int(length.min())}, the shortest window there is")
        kept = able[length[able].argsort(stable=True)[-queries:]].sort().values
        per_query = ("q", "index_q", "index_weights", "starts", "ends")
        cut: dict[str, Any] = {each: getattr(self, each)[kept].contiguous() for each in per_query}
        return replace(self, **cut)

    def to(self, device: str | torch.device) -> Activations:
        """The same on another device; in bf16 where that is a GPU, as its kernels multiply."""
        on_gpu = torch.device(device).type == "cuda"
        moved: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                floating = each.name in ("q", "kv", "index_q", "index_k")
                moved[each.name] = value.to(device, torch.bfloat16 if on_gpu and floating else value.dtype)
        return replace(self, **moved)


def drawn(
    model: Model,
    context: int,
    queries: int = 64,
    seed: int = 0,
    device: str = "cpu",
    sharpness: float = 4.0,
    contexts: Sequence[int] = (),
) -> Activations:
    """Random activations of a model: the last queries of a context, and an indexer that knows nothing of its attention.

    ``contexts`` names shorter ones, whose last queries are drawn too (see ``until``).

    Attention scores are normal with standard deviation ``sharpness``: 0 is even attention, at 4 a hundredth of a long context
    holds 95 % of a head's mass; the heads look at different tokens.

    Raises:
        SpecError: not MLA with a value of 512 channels, or another score form than "weighted_relu".
    """
    if model.attention != "mla" or model.d_nope + model.d_rope not in (512, 576):
        raise SpecError("attention", model.attention, '"mla" of 512 or 576 channels')
    if model.score != "weighted_relu":
        raise SpecError("score", model.score, '"weighted_relu"')
    draw, width = Draw(seed, device), model.d_nope + model.d_rope
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    lengths = {end for each in {context, *contexts} for end in range(max(each - queries, 0) + 1, min(each, context) + 1)}
    ends = torch.tensor(sorted(lengths), dtype=torch.int32, device=device)
    queries = len(ends)
    return Activations(
        draw.normal(queries, model.heads, width, dtype=dtype, scale=sharpness),
        draw.normal(context, 1, width, dtype=dtype),
        draw.normal(queries, model.index_heads, model.index_head_dim, dtype=dtype),
        draw.normal(context, model.index_head_dim, dtype=dtype),
        draw.normal(queries, model.index_heads),
        torch.zeros_like(ends),
        ends,
        width**-0.5,
        draw.normal(model.heads) if model.attn_sink else None,
        f"random, {model.name}",
    )


def save(activations: Activations, path: Path | str) -> None:
    """Write them to a file that ``load`` and ``dsa quality --activations`` read."""
    torch.save({each.name: _portable(getattr(activations, each.name)) for each in fields(activations)}, path)


def load(path: Path | str) -> Activations:
    """Read what ``save`` wrote; nothing in the file is executed.

    Raises:
        InputError: the file is none of these.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
        return Activations(**found)
    except OSError:
        raise
    except Exception as error:  # torch tells of a foreign file in many ways
        if isinstance(error, InputError):
            raise
        raise InputError("activations", f"{path}: {type(error).__name__}", "a file written by quality.save") from None


def _portable(value: Any) -> Any:
    return value.detach().cpu().contiguous() if isinstance(value, Tensor) else value
