"""PagedCache: the caches of all layers, the pages of each sequence, and the steps that fill them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import choice
from ..errors import InputError
from ..problem import checks
from ..problem.caches import IndexKLayout
from ..problem.kv_layouts import kv_layout
from ..problem.presets import Model
from . import step as steps
from .step import Step


class LayerCache(NamedTuple):
    """One layer's caches, which share the page table."""

    kv: Tensor
    """uint8 [blocks, page, 1, 656], or rows as they are, [blocks, page, 1, 576] of a floating dtype."""
    index_k: Tensor
    """uint8 [blocks, page, 1, index_head_dim + 4], or rows as they are."""


class PagedCache:
    """Caches of pages that sequences take as they grow.

    Args:
        model: whose layers they are.
        cos_sin: fp32 [positions, d_rope], see ``rotary_table``; on the device of the caches.
        layers: how many.
        blocks: pages of each layer's caches, for all sequences together.
        batch: sequences at once.
        max_context: tokens that a sequence may have; as many as the table has positions where None.
        plain: a dtype in which latents are stored as they are, not as FP8: bf16, or on the CPU also fp32.
        scores: "fp8", or "bf16" for index keys that are not quantised either (of the dtype ``plain`` where there is one).

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
    ) -> None:
        checks.one_of("scores", scores, ("fp8", "bf16"))
        tokens = len(cos_sin) if max_context is None else max_context
        if tokens > len(cos_sin):
            raise InputError("max_context", tokens, f"{len(cos_sin)}, the positions of cos_sin, or less")
        device = cos_sin.device
        self.model, self.cos_sin, self.plain = model, cos_sin, plain
        self.held = [0] * batch
        """Tokens of each sequence, as the host knows them."""
        self.page_table = torch.full((batch, -(-tokens // model.page)), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.layers = [LayerCache(self._kv(blocks, device), self._keys(blocks, device, scores)) for _ in range(layers)]
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(range(blocks))[::-1]

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
        wanted = [-(-(held + more) // self.model.page) for held, more in zip(self.held, counts, strict=True)]
        missing = [max(0, pages - len(own)) for pages, own in zip(wanted, self._pages, strict=True)]
        if max(wanted, default=0) > self.page_table.shape[1] or sum(missing) > len(self._free):
            limits = f"sequences of {self.page_table.shape[1]} pages, {len(self._free)} of which are free"
            raise InputError("counts", list(counts), limits)
        for sequence, more in enumerate(missing):
            for _ in range(more):
                block = self._free.pop()
                self.page_table[sequence, len(self._pages[sequence])] = block
                self._pages[sequence].append(block)
        self.held = [held + more for held, more in zip(self.held, counts, strict=True)]

    def release(self, sequence: int) -> None:
        """End a sequence: its pages are free, its place empty."""
        self._free += self._pages[sequence][::-1]
        self._pages[sequence] = []
        self.held[sequence] = 0
        self.lengths[sequence] = 0
        self.page_table[sequence] = -1

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget each sequence's last tokens (drafts that were not accepted); their pages stay."""
        if len(counts) != len(self.held) or any(not 0 <= less <= held for less, held in zip(counts, self.held, strict=True)):
            raise InputError("counts", list(counts), f"0 to {self.held}")
        self.held = [held - less for held, less in zip(self.held, counts, strict=True)]
        self.lengths.copy_(torch.tensor(self.held, dtype=torch.int32))

    def prefill(self, counts: Sequence[int], ranks: int = 1) -> Step:
        """A step of ``counts[b]`` new tokens of each sequence: a prompt, or a chunk of one behind its earlier chunks.

        Args:
            ranks: how many share the scoring of rows (tensor parallelism).

        Raises:
            InputError: see ``grow``.
        """
        before = list(self.held)
        self.grow(counts)
        self.lengths.copy_(torch.tensor(self.held, dtype=torch.int32))
        taking = [sequence for sequence, more in enumerate(counts) if more]
        place, offsets = 0, {}
        for sequence in taking:
            offsets[sequence] = place
            place += self.held[sequence]
        new = [torch.arange(before[sequence], self.held[sequence]) for sequence in taking]
        positions = torch.cat([*new, torch.empty(0, dtype=torch.int64)])
        starts = torch.cat([torch.full((len(each),), offsets[s]) for each, s in zip(new, taking, strict=True)] or [positions])
        context = torch.cat([self._slots_of(s, torch.arange(self.held[s])) for s in taking] or [positions])
        slots = context[starts + positions]
        ends = starts + positions + 1
        return self._flat(positions, slots, context, starts, ends, ranks)

    def _slots_of(self, sequence: int, tokens: Tensor) -> Tensor:
        """Where tokens of a sequence lie, by the host's knowledge."""
        pages, page = torch.tensor(self._pages[sequence], dtype=torch.int64), self.model.page
        return pages[tokens // page] * page + tokens % page

    def _flat(self, positions: Tensor, slots: Tensor, context: Tensor, starts: Tensor, ends: Tensor, ranks: int) -> Step:
        from ..distributed import balanced_bounds

        device, seen = self.page_table.device, (ends - starts)
        longest = int(seen.max()) if len(seen) else 0
        first, last = (bound.to(device, torch.int32) for bound in (starts, ends))
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
        slots = (
            choice.slots_of(torch.where(lengths > 0, positions, -1).int(), self.page_table, self.model.page).long().flatten()
        )
        page, topk = self.model.page, self.model.topk
        if self.plain is None:
            short = steps.whole_slots(lengths, self.page_table, page, topk) if max_context <= topk else None
            return Step(self.cos_sin, positions.flatten().long(), slots, self.page_table, lengths, max_context, chosen=short)
        batch = len(self.page_table)
        tokens = torch.arange(max_context, dtype=torch.int32, device=self.lengths.device).expand(batch, -1)
        context = choice.slots_of(tokens.contiguous(), self.page_table, page).clamp(min=0).long().flatten()
        starts = (torch.arange(batch, dtype=torch.int32, device=context.device) * max_context).repeat_interleave(next_n)
        ends = starts + lengths.flatten()
        short = steps.whole_windows(starts, ends, topk) if max_context <= topk else None
        return Step(
            self.cos_sin, positions.flatten().long(), slots, self.page_table, lengths, max_context, context, starts, ends, short
        )
