"""Measures: recall, captured mass and the error of the output for each way of choosing and each k, over some queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functions
from ..errors import InputError
from ..ops.attention.problem import D_V
from ..problem import checks
from ..train.dense import dense_attention
from .activations import Activations
from .rankings import CHOICES, Ranked, ranks

_BYTES = 1 << 26
"""Of scores in memory at a time; five orders and what sorting needs take twenty times as much."""

_ALIGNED_ROWS = 4  # kernels read windows of 4 bytes that lie on 16-byte addresses


@dataclass(frozen=True)
class Row:
    """What a choice of k tokens a query is worth, on average over the queries."""

    data: str
    context: int
    k: int
    choice: str
    recall: float
    """Share of attention's own top k that is chosen."""
    hits: float
    """Share of the few tokens that weigh most (as many as the smallest k asked for) that is chosen; never falls as k grows."""
    mass: float
    """Share of attention's mass that the chosen tokens hold; never falls as k grows."""
    error: float
    """Distance of the output from dense attention's, over the norm of that."""
    overlap: float | None
    """Share of what unquantised scores of the indexer choose; of choices by the indexer."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@torch.no_grad()
def measure(of: Activations, ks: Sequence[int], choices: Sequence[str] = CHOICES, seed: int = 0) -> list[Row]:
    """Compare choices with attention over everything: one row for each choice and k.

    Scores of [some queries, tokens] are in memory at a time; runs on the GPU where the activations lie there.

    Args:
        of: the layer's activations, of queries of about one context.
        ks: tokens that each query may choose, 1 to 65536; from a window's length on everything is chosen.
        choices: of ``CHOICES``.
        seed: of the random choice.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    _check(of, ks, choices)
    ks = sorted(set(ks))
    most = min(ks[-1], len(of.kv))
    dense, lse = dense_attention(of.q, of.kv, of.sm_scale, of.starts, of.ends, sink=of.sink)
    chosen = {choice: torch.empty(len(of.q), most, dtype=torch.int32, device=of.q.device) for choice in choices}
    sums = {choice: torch.zeros(4, len(ks), dtype=torch.float64) for choice in choices}
    for rows, part in _parts(of):
        ranked = Ranked(part, _mass(part, lse[rows]), seed + rows.start)
        for choice, found in _counted(ranked, ks, choices).items():
            sums[choice] += found
            order = ranked.order(choice)[:, :most]
            chosen[choice][rows] = order.masked_fill(~ranked.inside.gather(1, order), -1).int()
    made = []
    for choice in choices:
        recall, hits, mass, overlap = (sums[choice] / len(of.q)).tolist()
        by_indexer = choice in ("bf16", "fp8")
        for number, k in enumerate(ks):
            error = _error(of, chosen[choice][:, :k], dense)
            shared = overlap[number] if by_indexer else None
            made.append(Row(of.name, of.context, k, choice, recall[number], hits[number], mass[number], error, shared))
    return made


def _check(of: object, ks: Sequence[int], choices: Sequence[str]) -> None:
    if not isinstance(of, Activations) or not len(of.q):
        raise InputError("of", type(of).__name__ if not isinstance(of, Activations) else "no queries", "Activations of queries")
    if not isinstance(ks, Sequence) or not ks or any(type(k) is not int or not 1 <= k <= 1 << 16 for k in ks):
        raise InputError("ks", repr(ks), "numbers of tokens, 1 to 65536")
    if isinstance(choices, str):
        raise InputError("choices", repr(choices), "a list of them")
    for choice in choices:
        checks.one_of("choices", choice, CHOICES)


def _parts(of: Activations) -> Iterator[tuple[slice, Activations]]:
    """Some queries at a time."""
    step = max(_ALIGNED_ROWS, _BYTES // (4 * max(len(of.kv), 1)) // _ALIGNED_ROWS * _ALIGNED_ROWS)
    for first in range(0, len(of.q), step):
        rows = slice(first, min(first + step, len(of.q)))
        cut = {name: getattr(of, name)[rows] for name in ("q", "index_q", "index_weights", "starts", "ends")}
        yield rows, Activations(**{**vars(of), **cut})


def _mass(of: Activations, lse: Tensor) -> Tensor:
    """fp32 [queries, tokens]: attention's distribution, averaged over heads; a sink's share is left out."""
    mass = torch.zeros(len(of.q), len(of.kv), dtype=torch.float32, device=of.q.device)
    token = torch.arange(len(of.kv), device=of.q.device)
    inside = (token >= of.starts[:, None]) & (token < of.ends[:, None])
    for head in range(of.q.shape[1]):  # all at once would take heads × queries × tokens floats
        scores = (of.q[:, head] @ of.kv[:, 0].T).float() * of.sm_scale
        mass += torch.exp(scores - lse[:, head, None]).masked_fill(~inside, 0.0)
    return mass / of.q.shape[1]


def _counted(ranked: Ranked, ks: Sequence[int], choices: Sequence[str]) -> dict[str, Tensor]:
    """fp64 [4, ks] of each choice, summed over the queries: recall, hits, mass, overlap with the unquantised scores."""
    exact, plain = ranks(ranked.order("exact")), None
    if {"bf16", "fp8"} & set(choices):
        plain = ranks(ranked.order("bf16"))
    length, whole = ranked.inside.sum(1), ranked.mass.sum(1)
    found = {}
    for choice in choices:
        order = ranked.order(choice)
        by_mass, weighed = exact.gather(1, order), ranked.mass.gather(1, order).cumsum(1)
        by_scores = by_mass if plain is None else plain.gather(1, order)
        columns = []
        for k in ks:
            most, few = length.clamp(max=k), length.clamp(max=ks[0])
            first = slice(0, min(k, order.shape[1]))
            captured = weighed[:, first][:, -1] / whole
            shares = (
                _share(by_mass[:, first], most),
                _share(by_mass[:, first], few),
                captured,
                _share(by_scores[:, first], most),
            )
            columns.append(torch.stack([share.double().nan_to_num(1.0).sum() for share in shares]))
        found[choice] = torch.stack(columns, 1).cpu()
    return found


def _share(places: Tensor, most: Tensor) -> Tensor:
    """Of the first ``most`` [queries] places of a ranking, the share that is among ``places`` [queries, chosen]."""
    return (places < most[:, None]).sum(1) / most


def _error(of: Activations, chosen: Tensor, dense: Tensor) -> float:
    """‖out - dense‖ / ‖dense‖ of the attention over the chosen."""
    out, _ = functions.sparse_attention(of.q, of.kv, chosen[:, None].contiguous(), of.sm_scale, sink=of.sink)
    assert out.shape[-1] == D_V
    away, size = (out.double() - dense.double()).norm().item(), dense.double().norm().item()
    return away / size if size else 0.0
