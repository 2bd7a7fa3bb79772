"""Ways to share a step of a layer among ranks, each ready to be called, with what one rank computes of it to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import choice, functions
from ...distributed import ContextParallel, Deal, Shard, TensorParallel, balanced_bounds, gather_rows
from ...layer import Layer
from ...problem.caches import IndexKLayout
from ...problem.kv_layouts import kv_layout
from ...problem.presets import Model
from .cases import Case

Results = tuple[Tensor, ...]
"""out, lse, chosen."""
ALONE, PLAIN = "one GPU", "plain"
SAMPLE = 256  # rows of prefill that are compared
_STORED = 1 << 18  # tokens that are quantised into a cache at a time


@dataclass(frozen=True)
class Way:
    """One way."""

    name: str
    """"tensor", "context", "data", or the same and ", plain"."""
    run: Callable[[], Results]
    found: Callable[[Results], Results]
    """What of the results is compared; ``expected`` gives the same by one rank."""
    expected: Callable[[], Results]


def _normal(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """bf16, drawn in place: in fp32 the queries of 128K tokens take 38 GB."""
    return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(std=scale)


class Prefill:
    """A sequence from its first token to its last: every row sees those before it, and itself."""

    def __init__(self, case: Case, rank: int, world: int, group: Any, device: torch.device) -> None:
        self._case, self._rank, self._world, self._group, self._device = case, rank, world, group, device
        torch.manual_seed(1)  # the same on every rank
        model = self._model = case.of_rank(1)
        tokens, width = case.context, model.d_nope + model.d_rope
        self._kv = _normal(tokens, 1, width, device=device, scale=0.1)
        self._keys = functions.quantize_index_k(_normal(tokens, model.index_head_dim, device=device))
        self._index_q = _normal(tokens, model.index_heads, model.index_head_dim, device=device)
        self._weights = torch.randn(tokens, model.index_heads, device=device)
        self._ends = torch.arange(1, tokens + 1, dtype=torch.int32, device=device)
        self._zigzag, self._consecutive = Deal.zigzag(tokens, world), _stretches(tokens, world)
        rows = tokens // case.least if world == 1 else max(self._zigzag.most, self._consecutive.most)
        self._flat_q = _normal(rows * model.heads * width, device=device, scale=10.0)  # of all heads, or all rows of some

    def ways(self) -> Iterator[Way]:
        """One rank's first, as there is only one; plain ones before ours."""
        tokens, world, rank = self._case.context, self._world, self._rank
        everything = slice(0, tokens)
        if world == 1:
            yield self._alone()
            return
        bounds = balanced_bounds(list(range(1, tokens + 1)), world)
        mine = self._case.of_rank(world)
        yield self._way(f"tensor, {PLAIN}", Layer(mine), self._step(everything, mine.heads))
        dealt = Layer(mine, parallel=TensorParallel(self._group, bounds))
        yield self._way("tensor", dealt, self._step(everything, mine.heads))
        first = self._step(self._consecutive.rows(rank, self._device))
        yield Way(f"context, {PLAIN}", lambda: self._gather_first(first, self._consecutive), *self._compared(first))
        layer = Layer(self._model, parallel=ContextParallel(self._zigzag, group=self._group))
        yield self._way("context", layer, self._step(self._zigzag.rows(rank, self._device)))

    def _alone(self) -> Way:
        """One GPU, in stretches of rows one after another where it does not hold all; of those the last is compared."""
        tokens, parts = self._case.context, self._case.least
        layer = Layer(self._model)
        steps = [self._step(slice(tokens // parts * part, tokens // parts * (part + 1))) for part in range(parts)]

        def run() -> Results:
            for step in steps[:-1]:
                layer.prefill(**step)  # its outputs go before the next one's come
            return layer.prefill(**steps[-1])

        return Way(ALONE, run, *self._compared(steps[-1]))

    def _step(self, rows: slice | Tensor, heads: int = 0) -> dict[str, Any]:
        """Arguments of ``Layer.prefill``: the rows' own, of keys and latents all or the rows' own."""
        ends = self._ends[rows]
        heads, width = heads or self._model.heads, self._kv.shape[-1]
        dealt = isinstance(rows, Tensor)
        return {
            "q": self._flat_q[: len(ends) * heads * width].view(len(ends), heads, width),
            "kv": self._kv[rows] if dealt else self._kv,
            "index_q": self._index_q[rows],
            "index_weights": self._weights[rows],
            "index_k": self._keys[0].view(torch.uint8)[rows].view(self._keys[0].dtype) if dealt else self._keys[0],
            "index_k_scale": self._keys[1][rows] if dealt else self._keys[1],
            "starts": torch.zeros_like(ends),
            "ends": ends,
        }

    def _way(self, name: str, layer: Layer, step: dict[str, Any]) -> Way:
        return Way(name, lambda: layer.prefill(**step), *self._compared(step))

    def _gather_first(self, step: dict[str, Any], deal: Deal) -> Results:
        """As one writes it at first: everything is gathered, then the rank's rows are computed."""
        sent = [step["kv"], step["index_k"], step["index_k_scale"]]
        kv, index_k, index_k_scale = gather_rows(sent, deal, self._group).wait()
        whole = {"kv": kv, "index_k": index_k, "index_k_scale": index_k_scale}
        return Layer(self._model).prefill(**{**step, **whole})

    def _compared(self, step: dict[str, Any]) -> tuple[Callable[[Results], Results], Callable[[], Results]]:
        """Some rows from everywhere: those of the results, and the same computed by this rank alone."""
        rows = torch.linspace(0, len(step["q"]) - 1, min(SAMPLE, len(step["q"])), device=self._device).long()

        def expected() -> Results:
            q8, folded = functions.quantize_index_q(step["index_q"][rows], step["index_weights"][rows])
            windows = step["starts"][rows], step["ends"][rows]
            chosen = choice.index_select(q8, *self._keys, folded, *windows, self._model.topk)
            scale = self._kv.shape[-1] ** -0.5
            return (*functions.sparse_attention(step["q"][rows], self._kv, chosen[:, None], scale), chosen)

        return lambda results: tuple(each[rows] for each in results), expected


def _stretches(tokens: int, world: int) -> Deal:
    return Deal([torch.arange(tokens * rank // world, tokens * (rank + 1) // world) for rank in range(world)])


class Decode:
    """The newest token of every sequence of a batch, whose caches are full."""

    def __init__(self, case: Case, rank: int, world: int, group: Any, device: torch.device) -> None:
        self._case, self._rank, self._world, self._group, self._device = case, rank, world, group, device
        torch.manual_seed(2)  # the same on every rank
        model = self._model = case.of_rank(1)
        pages = -(-case.context // model.page)
        blocks = case.batch * pages
        self._caches = _caches(model, blocks, device)
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).view(case.batch, pages)
        rows = case.batch, 1
        self._step: dict[str, Any] = {
            "q": _normal(*rows, model.heads, model.d_nope + model.d_rope, device=device, scale=10.0),
            **self._caches,
            "index_q": _normal(*rows, model.index_heads, model.index_head_dim, device=device),
            "index_weights": torch.randn(*rows, model.index_heads, device=device),
            "lengths": torch.full(rows, case.context, dtype=torch.int32, device=device),
            "page_table": table.int().to(device),
            "max_context": case.context,
        }

    def ways(self) -> Iterator[Way]:
        """As ``Prefill.ways``; "data" has a part of the sequences on each rank, and no exchange."""
        alone = Layer(self._model)
        if self._world == 1:
            yield Way(ALONE, lambda: alone.decode(**self._step), lambda found: found, lambda: alone.decode(**self._step))
            return
        mine = self._case.of_rank(self._world)
        heads = slice(self._rank * mine.heads, (self._rank + 1) * mine.heads)
        step: dict[str, Any] = {**self._step, "q": self._step["q"][:, :, heads].contiguous()}

        def of_heads() -> Results:
            out, lse, chosen = alone.decode(**self._step)
            return out[:, :, heads], lse[:, :, heads], chosen

        for name, layer in (
            (f"tensor, {PLAIN}", Layer(mine)),
            ("tensor", Layer(mine, parallel=TensorParallel(self._group, least=0))),
        ):
            yield Way(name, lambda layer=layer: layer.decode(**step), lambda found: found, of_heads)  # type: ignore[misc]
        yield self._by_position(alone)
        own = slice(self._case.batch * self._rank // self._world, self._case.batch * (self._rank + 1) // self._world)
        of_rows = ("q", "index_q", "index_weights", "lengths", "page_table")
        part: dict[str, Any] = {name: value[own].clone() if name in of_rows else value for name, value in self._step.items()}
        whole = lambda: tuple(each[own] for each in alone.decode(**self._step))  # noqa: E731
        yield Way("data", lambda: alone.decode(**part), lambda found: found, whole)

    def _by_position(self, alone: Layer) -> Way:
        """Pages are dealt out in turn."""
        page = self._model.page
        shard = Shard.interleaved(self._rank, self._world, page)
        held = self._step["page_table"][:, self._rank :: self._world]
        part = {name: cache[held.flatten().long()] for name, cache in self._caches.items()}
        table = torch.arange(held.numel(), dtype=torch.int32, device=self._device).view(held.shape)
        layer = Layer(self._model, parallel=ContextParallel(shard=shard, group=self._group, own_heads=True))
        mine = self._model.heads // self._world
        heads = slice(self._rank * mine, (self._rank + 1) * mine)
        step: dict[str, Any] = {**self._step, **part, "page_table": table}

        def as_slots(found: Results) -> Results:
            out, lse, tokens = found
            slots = choice.slots_of(tokens.flatten(0, 1), self._step["page_table"], page)
            return out, lse, slots.view(tokens.shape)

        def expected() -> Results:
            out, lse, chosen = alone.decode(**self._step)
            return out[:, :, heads], lse[:, :, heads], chosen

        return Way("context", lambda: layer.decode(**step), as_slots, expected)


def _caches(model: Model, blocks: int, device: torch.device) -> dict[str, Tensor]:
    """Full of random tokens."""
    kv = kv_layout(model.kv_layout, model.page).empty(blocks, device=device)
    index = IndexKLayout(model.page, model.index_head_dim).empty(blocks, device=device)
    for first in range(0, blocks * model.page, _STORED):
        slots = torch.arange(first, min(first + _STORED, blocks * model.page), dtype=torch.int32, device=device)
        nope, rope = (_normal(len(slots), width, device=device, scale=0.1) for width in (model.d_nope, model.d_rope))
        functions.store_kv(nope, rope, slots, kv, layout=model.kv_layout)
        functions.store_index_k(_normal(len(slots), model.index_head_dim, device=device), slots, index)
    return {"kv_cache": kv, "index_cache": index}


PROBLEMS: dict[str, Any] = {"prefill": Prefill, "decode": Decode}
