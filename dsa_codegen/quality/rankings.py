"""Rankings: the order in which each way of choosing takes the tokens of a window; a choice of k is the first k of them.

One order serves every k, and a larger choice holds every smaller one. Ties go to the lowest token, as in ``select``, so the
first topk of "fp8" and "bf16" are the tokens that serving chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import functions
from .activations import Activations

CHOICES = ("exact", "bf16", "fp8", "window", "random")
"""By attention's own mass summed over heads; by the indexer's scores, unquantised and as served; the latest; any."""


class Ranked:
    """The orders of some queries.

    Args:
        activations: of the queries.
        mass: fp32 [queries, tokens], attention's mass summed over heads, 0 outside the windows.
    """

    def __init__(self, activations: Activations, mass: Tensor, seed: int = 0) -> None:
        self.of, self.mass, self.seed = activations, mass, seed
        token = torch.arange(mass.shape[1], device=mass.device)
        self._orders: dict[str, Tensor] = {}
        self.inside = (token >= activations.starts[:, None]) & (token < activations.ends[:, None])

    def order(self, choice: str) -> Tensor:
        """int64 [queries, tokens]: tokens from the first that is chosen to the last; those outside the window come last."""
        if choice not in self._orders:
            scores = _SCORES[choice](self).masked_fill(~self.inside, -math.inf)
            self._orders[choice] = scores.sort(dim=1, descending=True, stable=True).indices
        return self._orders[choice]

    def indexer(self, scores: str) -> Tensor:
        """The indexer's logits, as a layer computes them."""
        of = self.of
        windows = of.starts, of.ends
        if scores == "fp8":
            q, weights = functions.quantize_index_q(of.index_q.bfloat16(), of.index_weights)
            k, k_scale = functions.quantize_index_k(of.index_k.bfloat16())
            return functions.indexer_logits(q, k, k_scale, weights, *windows)
        weights = of.index_weights * math.prod(of.index_q.shape[1:]) ** -0.5
        return functions.indexer_logits(of.index_q, of.index_k, None, weights, *windows, scores="bf16")


def ranks(order: Tensor) -> Tensor:
    """int64 like ``order``: the place of each token in it."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def _latest(ranked: Ranked) -> Tensor:
    return torch.arange(ranked.mass.shape[1], device=ranked.mass.device).float().expand_as(ranked.mass)


def _anywhere(ranked: Ranked) -> Tensor:
    generator = torch.Generator(ranked.mass.device).manual_seed(ranked.seed)
    return torch.rand(ranked.mass.shape, generator=generator, device=ranked.mass.device)


_SCORES: dict[str, Callable[[Ranked], Tensor]] = {
    "exact": lambda ranked: ranked.mass,
    "bf16": lambda ranked: ranked.indexer("bf16"),
    "fp8": lambda ranked: ranked.indexer("fp8"),
    "window": _latest,
    "random": _anywhere,
}
