"""What a module's steps can launch within stated limits: the stages of a layer, and the prologues with its own options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import ops
from ..distributed import ContextParallel
from ..distributed.modes import Alone
from ..ops.index_prologue import IndexPrologueSpec
from ..ops.latent_prologue import LatentPrologueSpec
from ..ops.rotated import NORM_NAMES
from ..problem.op import Op
from ..problem.presets import Model
from ..problem.values import Sizes, Spec
from ..runtime import serving
from .shape import Shape

_BY_PROLOGUES = ("quantize", "quantize_paged")
"""Stages of a layer whose work the prologues do."""


def calls(
    model: Model, shape: Shape, dtype: torch.dtype, plain: bool, limits: serving.Limits
) -> Iterator[tuple[Op, Spec, Sizes]]:
    """One call for each variant.

    Args:
        model: with the heads of this rank.
        dtype: of the parameters.
        plain: whether latents lie in the caches as they are.
    """
    decoded = None if limits.max_batch is None else limits.max_batch * max(limits.next_n)
    tokens = None if decoded is None or limits.max_queries is None else max(decoded, limits.max_queries)
    if plain:  # decode attends as prefill does
        limits = replace(limits, max_queries=tokens)
    for op, spec, sizes in serving.calls(model, limits):
        if (
            op.name not in _BY_PROLOGUES
            and not (plain and op.name == "attention_paged")
            and getattr(spec, "slots", "i64") == "i64"
        ):
            yield op, spec, sizes
    for spec in prologues(model, shape, dtype, plain):
        op = ops.get("index_prologue" if isinstance(spec, IndexPrologueSpec) else "latent_prologue")
        yield from ((op, spec, sizes) for sizes in serving.buckets(op, spec, {"tokens": tokens}))


def shared_calls(model: Model, parallel: Alone, limits: serving.Limits) -> Iterator[tuple[Op, Spec, Sizes]]:
    """What ranks call beyond that: merges, and latents of all ranks, read back from pages of one token."""
    yield from parallel.further(model, limits)
    if isinstance(parallel, ContextParallel):
        op, largest = ops.get("gather_paged"), limits.highest()["gather_paged"]
        for spec in op.specs(model):
            if spec.layout != "index_k" and 0 not in largest.values():
                of_tokens = replace(spec, page=1, slots="i64")
                yield from ((op, of_tokens, sizes) for sizes in serving.buckets(op, of_tokens, largest))


def prologues(model: Model, shape: Shape, dtype: torch.dtype, plain: bool) -> Iterator[IndexPrologueSpec | LatentPrologueSpec]:
    """The prologues of a step that scores, and of one that does not."""
    named = NORM_NAMES[dtype]
    heads, width, scales = model.index_heads, model.index_head_dim, shape.power_of_two
    keys = IndexPrologueSpec(
        heads,
        width,
        model.d_rope,
        shape.index_rotary,
        True,
        shape.hadamard,
        named,
        named,
        scales,
        model.page,
        batch_invariant=model.invariant,
    )
    yield keys
    yield replace(keys, heads=0, weights="bf16")  # a step that scores nothing has weights of no elements
    layout = "bf16" if plain else model.kv_layout
    rounded = shape.power_of_two and not plain
    options: dict[str, Any] = {"page": model.page, "batch_invariant": model.invariant}
    yield LatentPrologueSpec(layout, model.d_nope, shape.rotary, "nope", named, power_of_two=rounded, **options)
