"""PagedCache: the caches of all layers, the pages of each sequence, and the steps that fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import choice
from ..distributed import ContextParallel, Shard, TensorParallel, balanced_bounds
from ..distributed.gather import place
from ..distributed.modes import Alone
from ..errors import InputError
from ..problem import checks
from ..problem.caches import IndexKLayout
from ..problem.kv_layouts import kv_layout
from ..problem.presets import Model
from . import parts
from . import step as steps
from .step import Shared, Step


class LayerCache(NamedTuple):
    """One layer's caches, which share the page table."""

    kv: Tensor
    """uint8 [blocks, page, 1, 656], or rows as they are, [blocks, page, 1, 576] of a floating dtype."""
    index_k: Tensor
    """uint8 [blocks, page, 1, index_head_dim + 4], or rows as they are."""


class PagedCache:
    """Caches of pages that sequences take as they grow.

    Under ``ContextParallel`` a rank's caches hold its part of every sequence, blocks of consecutive tokens that are dealt out
    in turn. Ranks call everything alike; a prefill step then has the rows of the tokens that the rank's caches hold.

    Args:
        model: whose layers they are.
        cos_sin: fp32 [positions, d_rope], see ``rotary_table``; on the device of the caches.
        layers: how many.
        blocks: pages of each layer's caches, for all sequences together.
        batch: sequences at once.
        max_context: tokens that a sequence may have; as many as the table has positions where None.
        plain: a dtype in which latents are stored as they are, not as FP8: bf16, or on the CPU also fp32.
        scores: "fp8", or "bf16" for index keys that are not quantised either (of the dtype ``plain`` where there is one).
        parallel: as the layers' own, whose steps these caches make.

    ``grow``, ``release`` and ``rewind`` are the host's bookkeeping; ``step`` only launches, and may be captured.
    """

    def __init__(
        self,
        model: Model,
        cos_sin: Tensor,
        *,
        layers: int,
        blocks: int,
        batch: int,
        max_context: int | None = None,
        plain: torch.dtype | None = None,
        scores: str = "fp8",
        parallel: Alone | None = None,
    ) -> None:
        checks.one_of("scores", scores, ("fp8", "bf16"))
        self.parallel = Alone() if parallel is None else parallel
        self._ranks, self._shard = sharded(self.parallel, model.page)
        self._first = replace(self._shard, offset=0)  # the first rank's
        if self._sharded and (plain is not None or scores != "fp8"):
            name, value = ("plain", plain) if plain is not None else ("scores", repr(scores))
            raise InputError(name, value, "what FP8 caches have: others are not sharded (ContextParallel)")
        tokens = len(cos_sin) if max_context is None else max_context
        if tokens > len(cos_sin):
            raise InputError("max_context", tokens, f"{len(cos_sin)}, the positions of cos_sin, or less")
        device = cos_sin.device
        self.model, self.cos_sin, self.plain = model, cos_sin, plain
        self.held = [0] * batch
        """Tokens of each sequence, on all ranks together, as the host knows them."""
        self._longest = -(-tokens // model.page) * model.page
        pages = self._pages_of(self._longest, self._first)
        self.page_table = torch.full((batch, pages), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.layers = [LayerCache(self._kv(blocks, device), self._keys(blocks, device, scores)) for _ in range(layers)]
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._free, self._blocks, self._taken = list(range(blocks))[::-1], blocks, [0] * batch

    @property
    def _sharded(self) -> bool:
        return isinstance(self.parallel, ContextParallel)

    def _kv(self, blocks: int, device: torch.device) -> Tensor:
        model = self.model
        if self.plain is None:
            return kv_layout(model.kv_layout, model.page).empty(blocks, device)
        return self._rows(blocks, model.d_nope + model.d_rope, device)

    def _keys(self, blocks: int, device: torch.device, scores: str) -> Tensor:
        model = self.model
        if scores == "fp8":
            return IndexKLayout(model.page, model.index_head_dim).empty(blocks, device)
        return self._rows(blocks, model.index_head_dim, device)

    def _rows(self, blocks: int, width: int, device: torch.device) -> Tensor:
        """Rows as they are, and one more block behind them for what has no slot."""
        return torch.zeros(blocks + 1, self.model.page, 1, width, dtype=self.plain or torch.bfloat16, device=device)

    def grow(self, counts: Sequence[int]) -> None:
        """Let each sequence have so many more tokens, taking the pages they need.

        Raises:
            InputError: not a number for each sequence, or they do not fit; nothing is taken then.
        """
        if len(counts) != len(self.held) or min(counts, default=0) < 0:
            raise InputError("counts", list(counts), f"{len(self.held)} numbers of tokens, 0 or more")
        grown = [held + more for held, more in zip(self.held, counts, strict=True)]
        # Of all ranks the first holds the most of every sequence: where it has room all have, and all say so alike.
        most = [max(self._pages_of(tokens, self._first), taken) for tokens, taken in zip(grown, self._taken, strict=True)]
        if max(grown, default=0) > self._longest or sum(most) > self._blocks:
            free = self._blocks - sum(self._taken)
            raise InputError("counts", list(counts), f"sequences of {self._longest} tokens, in {free} pages that are free")
        for sequence, tokens in enumerate(grown):
            while len(self._pages[sequence]) < self._pages_of(tokens, self._shard):
                block = self._free.pop()
                self.page_table[sequence, len(self._pages[sequence])] = block
                self._pages[sequence].append(block)
        self.held, self._taken = grown, most

    def _pages_of(self, tokens: int, shard: Shard) -> int:
        """Pages of a rank for a sequence."""
        return -(-shard.number(tokens) // self.model.page)

    def release(self, sequence: int) -> None:
        """End a sequence: its pages are free, its place empty."""
        self._free += self._pages[sequence][::-1]
        self._pages[sequence], self._taken[sequence] = [], 0
        self.held[sequence] = 0
        self.lengths[sequence] = 0
        self.page_table[sequence] = -1

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget each sequence's last tokens (drafts that were not accepted); their pages stay."""
        if len(counts) != len(self.held) or any(not 0 <= less <= held for less, held in zip(counts, self.held, strict=True)):
            raise InputError("counts", list(counts), f"0 to {self.held}")
        self.held = [held - less for held, less in zip(self.held, counts, strict=True)]
        self.lengths.copy_(torch.tensor(self.held, dtype=torch.int32))

    def prefill(self, counts: Sequence[int], ranks: int | None = None) -> Step:
        """A step of ``counts[b]`` new tokens of each sequence: a prompt, or a chunk of one behind its earlier chunks.

        Under ``ContextParallel`` it is of the rank's tokens among them, ``step.shared.rows``.

        Args:
            ranks: how many share the scoring of rows (tensor parallelism); by default as many as ``parallel`` says.

        Raises:
            InputError: see ``grow``.
        """
        before = list(self.held)
        self.grow(counts)
        self.lengths.copy_(torch.tensor(self.held, dtype=torch.int32))
        taking = [parts.Part(sequence, before[sequence], self.held[sequence]) for sequence, more in enumerate(counts) if more]
        own = parts.own(taking, self._shard)
        held = torch.cat([*map(self._slots_of, taking), torch.empty(0, dtype=torch.int64)])
        shared = None
        if self._sharded:
            among = [parts.dealt(owners, self._ranks) for owners in (own.owners, own.context)]
            shared = Shared(own.rows.to(self.lengths.device), *among)
        if ranks is None:
            ranks = self._ranks if isinstance(self.parallel, TensorParallel) else 1
        longest = max((part.end for part in taking), default=0)
        return self._flat(own.positions, held[own.place], held, own.starts, longest, ranks, shared)

    def _slots_of(self, part: parts.Part) -> Tensor:
        """Where the rank's tokens of a sequence lie, by the host's knowledge."""
        tokens = torch.arange(self._shard.number(part.end))
        pages, page = torch.tensor(self._pages[part.sequence], dtype=torch.int64), self.model.page
        return pages[tokens // page] * page + tokens % page

    def _flat(
        self, positions: Tensor, slots: Tensor, context: Tensor, starts: Tensor, longest: int, ranks: int, shared: Shared | None
    ) -> Step:
        device, seen = self.page_table.device, positions + 1
        first, last = (bound.to(device, torch.int32) for bound in (starts, starts + seen))
        short = steps.whole_windows(first, last, self.model.topk) if longest <= self.model.topk else None
        return Step(
            self.cos_sin,
            positions.to(device),
            slots.to(device),
            self.page_table,
            seen.to(device, torch.int32),
            longest,
            context.to(device),
            first,
            last,
            short,
            balanced_bounds(seen.tolist(), ranks) if ranks > 1 else None,
            shared,
        )

    def decode(self, next_n: int = 1) -> Step:
        """A step of ``next_n`` new tokens of every sequence that has any: ``grow``, then ``step`` for the context there is."""
        self.grow([next_n if held else 0 for held in self.held])
        return self.step(next_n, max(self.held, default=0))

    def step(self, next_n: int, max_context: int) -> Step:
        """The device's half of ``decode``: lengths go up, and everything follows from them. Nothing waits for the device.

        In a CUDA graph it is captured together with the layers; before each replay ``grow`` makes room.

        Args:
            max_context: what no sequence's length is beyond.
        """
        active = (self.lengths > 0).int()
        self.lengths.add_(active * next_n)
        ahead = torch.arange(1 - next_n, 1, dtype=torch.int32, device=self.lengths.device)
        lengths = (self.lengths[:, None] + ahead) * active[:, None]
        positions = (lengths - 1).clamp(min=0)
        newest = torch.where(lengths > 0, positions, -1).int()
        local = self._shard.to_local(newest) if self._ranks > 1 and self._sharded else newest
        slots = choice.slots_of(local, self.page_table, self.model.page).long().flatten()
        page, topk = self.model.page, self.model.topk
        given = self.cos_sin, positions.flatten().long(), slots, self.page_table, lengths, max_context
        if self._sharded:  # choices are tokens
            whole = steps.whole_windows(torch.zeros_like(lengths.flatten()), lengths.flatten(), topk)
            return Step(*given, chosen=whole if max_context <= topk else None, shared=Shared())
        if self.plain is None:
            short = steps.whole_slots(lengths, self.page_table, page, topk) if max_context <= topk else None
            return Step(*given, chosen=short)
        batch = len(self.page_table)
        tokens = torch.arange(max_context, dtype=torch.int32, device=self.lengths.device).expand(batch, -1)
        context = choice.slots_of(tokens.contiguous(), self.page_table, page).clamp(min=0).long().flatten()
        starts = (torch.arange(batch, dtype=torch.int32, device=context.device) * max_context).repeat_interleave(next_n)
        ends = starts + lengths.flatten()
        short = steps.whole_windows(starts, ends, topk) if max_context <= topk else None
        return Step(*given, context, starts, ends, short)


def sharded(parallel: object, page: int) -> tuple[int, Shard]:
    """(ranks, the tokens that this one's caches hold)."""
    if not isinstance(parallel, Alone):
        raise InputError("parallel", repr(parallel), "a TensorParallel, ContextParallel or DataParallel, or None")
    if isinstance(parallel, TensorParallel):
        return place(parallel.group)[1], Shard.interleaved(0, 1, page)
    if not isinstance(parallel, ContextParallel):
        return 1, Shard.interleaved(0, 1, page)
    rank, ranks = place(parallel.group)
    shard = parallel.held(page)
    if shard != Shard.interleaved(rank, ranks, shard.block):
        raise InputError("parallel.shard", shard, f"Shard.interleaved({rank}, {ranks}, block): every rank deals out rows by it")
    if parallel.deal != "interleaved":
        allowed = '"interleaved": a module\'s rows are dealt out as its caches are, in blocks of shard.block tokens'
        raise InputError("parallel.deal", repr(parallel.deal), allowed)
    return ranks, shard
