"""What the queries of a prefill step see: keys and latents of its sequences, from one rank's caches or from all ranks'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..distributed import ContextParallel, gather_rows
from ..distributed.modes import Alone
from ..problem.presets import Model
from . import plain
from .cache import LayerCache
from .step import Step


class Context:
    """Of caches that hold all tokens; the step's own are stored before ``start``."""

    def __init__(self, model: Model, cache: LayerCache, step: Step) -> None:
        assert step.context is not None
        self._model, self._cache, self._slots = model, cache, step.context

    def start(self, scored: bool) -> None:
        """What comes from other ranks sets out: keys first, where they are ``scored``, then latents while the rank scores."""

    def keys(self) -> tuple[Tensor, Tensor | None]:
        """Keys [tokens, index_head_dim] in the order of the step's context, with a scale each where they are quantised."""
        if self._cache.index_k.dtype != torch.uint8:
            return plain.rows_at(self._slots, self._cache.index_k), None
        return functions.gather_index_k(self._cache.index_k, self._slots)

    def latents(self) -> Tensor:
        """[tokens, 576], in bf16, or as they are kept."""
        if self._cache.kv.dtype == torch.uint8:
            return functions.gather_kv(self._cache.kv, self._slots, layout=self._model.kv_layout)
        return plain.rows_at(self._slots, self._cache.kv)


class SharedContext(Context):
    """Of caches that are sharded by position: every rank sends what it holds, as it is stored (132 and 656 bytes a token)."""

    def __init__(self, model: Model, cache: LayerCache, step: Step, group: Any) -> None:
        super().__init__(model, cache, step)
        assert step.shared is not None and step.shared.context is not None
        self._deal, self._group = step.shared.context, group

    def start(self, scored: bool) -> None:
        """See above. Ranks start the same messages in the same order."""
        if scored:
            self._keys = gather_rows(list(functions.gather_index_k(self._cache.index_k, self._slots)), self._deal, self._group)
        stored = plain.rows_at(self._slots, self._cache.kv)
        self._latents = gather_rows([stored], self._deal, self._group)

    def keys(self) -> tuple[Tensor, Tensor | None]:
        """Of all ranks."""
        k, scale = self._keys.wait()
        return k, scale

    def latents(self) -> Tensor:
        """Of all ranks, read back from FP8."""
        (stored,) = self._latents.wait()
        pages = stored[:, None, None]  # of one token each
        slots = torch.arange(len(stored), device=stored.device)
        return functions.gather_kv(pages, slots, layout=self._model.kv_layout)


def made_of(model: Model, cache: LayerCache, step: Step, parallel: Alone) -> Context:
    """The context of a prefill step."""
    if isinstance(parallel, ContextParallel):
        return SharedContext(model, cache, step, parallel.group)
    return Context(model, cache, step)
