"""The cache layouts that serving engines store: where each field of a token lies, pack, unpack, slot arithmetic.

An FP8 cache is a uint8 tensor, one of rows as they are a bf16 tensor, whose first dimension counts blocks (pages). A token is
named by its physical slot, ``block * page + offset``; -1 or any slot at or past ``blocks * page`` means "no token". Kernels,
references and tests take the byte offsets from here, so that they cannot disagree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError, SpecError
from .quantization import e8m0_decode, e8m0_encode

_ALIGNMENT = 16  # bytes; kernels move as many at a time


@dataclass(frozen=True)
class Field:
    """One field of a token inside a page: byte ``base + offset_in_page * stride``, ``width`` bytes long."""

    base: int
    stride: int
    width: int


@dataclass(frozen=True)
class CacheLayout(ABC):
    """What every layout states: tokens per page, bytes, the shape of a block as engines allocate it."""

    page: int = 64

    def __post_init__(self) -> None:
        if self.page < 1:
            raise SpecError(f"{type(self).__name__}.page", self.page, "1 or more")

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes of a token, padding of the page aside."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, padding included."""
        return self.page * self.bytes_per_token

    @property
    def shape_per_block(self) -> tuple[int, ...]:
        """Shape of one block of a cache tensor, as engines allocate it."""
        return (self.page, 1, self.bytes_per_token)

    def empty(self, blocks: int, device: torch.device | str = "cpu") -> Tensor:
        """A cache of zeros, uint8 [blocks, …] of ``shape_per_block``, blocks a multiple of 16 bytes apart, as kernels want."""
        held = math.prod(self.shape_per_block)
        apart = -(-held // _ALIGNMENT) * _ALIGNMENT
        return torch.zeros(blocks, apart, dtype=torch.uint8, device=device)[:, :held].unflatten(1, self.shape_per_block)


@dataclass(frozen=True)
class IndexKLayout(CacheLayout):
    """Index keys, 132 B per token at head_dim 128. Planar: page × head_dim e4m3 bytes, then page fp32 scales."""

    head_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim < 1 or self.head_dim % 4:
            raise SpecError("IndexKLayout.head_dim", self.head_dim, "a multiple of 4 (the scales are fp32 words)")

    @property
    def bytes_per_token(self) -> int:
        return self.head_dim + 4

    @property
    def keys(self) -> Field:
        return Field(0, self.head_dim, self.head_dim)

    @property
    def scale(self) -> Field:
        return Field(self.page * self.head_dim, 4, 4)

    def pack(self, cache: Tensor, slots: Tensor, keys: Tensor, scales: Tensor) -> None:
        """Store e4m3 ``keys`` [n, head_dim] and fp32 ``scales`` [n] at ``slots`` [n]; invalid slots are skipped."""
        _scatter(self, cache, slots, ((self.keys, keys), (self.scale, scales.float().unsqueeze(-1))))

    def unpack(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """e4m3 keys [..., head_dim] and fp32 scales [...] of valid ``slots`` [...]."""
        keys = _gather(self, cache, slots, self.keys).view(torch.float8_e4m3fn)
        return keys, _gather(self, cache, slots, self.scale).view(torch.float32).squeeze(-1)

    def dequantize(self, cache: Tensor, slots: Tensor) -> Tensor:
        """fp32 keys [..., head_dim] of valid ``slots`` [...]."""
        keys, scales = self.unpack(cache, slots)
        return keys.float() * scales.unsqueeze(-1)


@dataclass(frozen=True)
class KvLayout(CacheLayout):
    """A latent KV cache: e4m3 channels with a scale per group, then rotary channels in bf16; ``d_v`` of them are the value."""

    @property
    @abstractmethod
    def stored_scales(self) -> str:
        """How scales are stored: "fp32", "e8m0" (powers of two), or "none" where the whole cache shares one."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What specs and functions call it."""

    @property
    @abstractmethod
    def d_nope(self) -> int:
        """Channels that are quantised."""

    @property
    @abstractmethod
    def d_rope(self) -> int:
        """Channels behind them that stay bf16."""

    @property
    @abstractmethod
    def d_v(self) -> int:
        """Channels, the first ones, that are the value."""

    @property
    @abstractmethod
    def group(self) -> int:
        """Channels that share a scale."""

    @property
    def groups(self) -> int:
        return self.d_nope // self.group

    @property
    @abstractmethod
    def nope(self) -> Field: ...

    @property
    @abstractmethod
    def scales(self) -> Field: ...

    @property
    @abstractmethod
    def rope(self) -> Field: ...

    @abstractmethod
    def encode(self, scales: Tensor) -> Tensor:
        """Scales [n, groups] as they are stored."""

    @abstractmethod
    def decode(self, stored: Tensor) -> Tensor:
        """fp32 scales [..., groups] of their stored bytes."""

    def pack(self, cache: Tensor, slots: Tensor, nope: Tensor, scales: Tensor, rope: Tensor) -> None:
        """Store e4m3 ``nope`` [n, d_nope], ``scales`` [n, groups] and bf16 ``rope`` [n, d_rope] at ``slots`` [n].

        Invalid slots are skipped. Scales are fp32; of "v4" they are powers of two, or their e8m0 bytes as uint8.
        """
        fields = ((self.nope, nope), (self.scales, self.encode(scales)), (self.rope, rope.bfloat16()))
        _scatter(self, cache, slots, fields)

    def unpack(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e4m3 nope [..., d_nope], fp32 scales [..., groups] and bf16 rope [..., d_rope] of valid ``slots`` [...]."""
        rope = _gather(self, cache, slots, self.rope)
        return (
            _gather(self, cache, slots, self.nope).view(torch.float8_e4m3fn),
            self.decode(_gather(self, cache, slots, self.scales)),
            rope.view(torch.bfloat16) if self.d_rope else rope.bfloat16(),  # no bytes have no strides to be divided
        )

    def dequantize(self, cache: Tensor, slots: Tensor, scale: float = 1.0) -> Tensor:
        """fp32 latent [..., d_nope + d_rope] of valid ``slots`` [...]: nope × scale, then rope.

        Args:
            scale: of the whole cache, where it has no others.
        """
        nope, scales, rope = self.unpack(cache, slots)
        dequantized = nope.float().reshape(*scales.shape, self.group) * (scales * scale).unsqueeze(-1)
        return torch.cat((dequantized.flatten(-2), rope.float()), dim=-1)


@dataclass(frozen=True)
class KvV32Layout(KvLayout):
    """Latent KV "v3.2", 656 B per token: 512 e4m3 (nope), 4 fp32 scales (one per 128), 64 bf16 (rope)."""

    name: ClassVar[str] = "v32"
    stored_scales: ClassVar[str] = "fp32"
    d_nope: ClassVar[int] = 512
    d_rope: ClassVar[int] = 64
    d_v: ClassVar[int] = 512
    group: ClassVar[int] = 128
    bytes_per_token: ClassVar[int] = 656

    @property
    def nope(self) -> Field:
        return Field(0, self.bytes_per_token, self.d_nope)

    @property
    def scales(self) -> Field:
        return Field(self.d_nope, self.bytes_per_token, 4 * self.groups)

    @property
    def rope(self) -> Field:
        return Field(self.d_nope + 4 * self.groups, self.bytes_per_token, 2 * self.d_rope)

    def encode(self, scales: Tensor) -> Tensor:
        return scales.float()

    def decode(self, stored: Tensor) -> Tensor:
        return stored.view(torch.float32)


@dataclass(frozen=True)
class KvV4Layout(KvLayout):
    """Latent KV "v4", 584 B per token, planar inside a page padded to a multiple of 576 B.

    page × (448 e4m3 nope + 64 bf16 rope), then page × 8 B of which 7 are e8m0 scales, one per 64 of the nope. All 512
    channels are the value.
    """

    name: ClassVar[str] = "v4"
    stored_scales: ClassVar[str] = "e8m0"
    d_nope: ClassVar[int] = 448
    d_rope: ClassVar[int] = 64
    d_v: ClassVar[int] = 512
    group: ClassVar[int] = 64
    bytes_per_token: ClassVar[int] = 584

    @property
    def page_bytes(self) -> int:
        return -(-self.page * self.bytes_per_token // self._row) * self._row

    @property
    def shape_per_block(self) -> tuple[int, ...]:
        return (self.page_bytes,)

    @property
    def _row(self) -> int:
        return self.d_nope + 2 * self.d_rope

    @property
    def nope(self) -> Field:
        return Field(0, self._row, self.d_nope)

    @property
    def rope(self) -> Field:
        return Field(self.d_nope, self._row, 2 * self.d_rope)

    @property
    def scales(self) -> Field:
        return Field(self.page * self._row, self.bytes_per_token - self._row, self.groups)

    def encode(self, scales: Tensor) -> Tensor:
        return scales if scales.dtype == torch.uint8 else e8m0_encode(scales)

    def decode(self, stored: Tensor) -> Tensor:
        return e8m0_decode(stored)


def split_slots(slots: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """(block, offset inside the block) of physical slots, int64."""
    wide = slots.long()
    return wide // page, wide % page


def valid_slots(slots: Tensor, tokens: int) -> Tensor:
    """Which slots name a token: 0 <= slot < tokens."""
    return (slots >= 0) & (slots < tokens)


def tokens_of(layout: CacheLayout, cache: Tensor) -> int:
    """How many slots a cache has."""
    return cache.shape[0] * layout.page


def as_pages(layout: CacheLayout, cache: Tensor) -> Tensor:
    """A view of the cache as uint8 [blocks, bytes in use], whatever the page's stride and inner shape.

    Raises:
        InputError: the dtype is not one byte wide, a page is too small for the layout, or a page is not contiguous.
    """
    used = layout.page * layout.bytes_per_token
    if cache.element_size() != 1 or cache.dim() < 2:
        raise InputError("cache", f"{cache.dtype} {list(cache.shape)}", f"uint8 [blocks, {used} or more bytes per page]")
    if cache.numel() and not cache[0].is_contiguous():
        raise InputError("cache", f"strides {cache.stride()}", "contiguous pages (only the first dimension may have gaps)")
    per_page = cache[0].numel() if cache.shape[0] else used
    if per_page < used or (cache.shape[0] > 1 and cache.stride(0) < used):
        raise InputError("cache", f"{per_page} bytes per page, stride {cache.stride(0)}", f"at least {used}")
    return cache.view(torch.uint8).as_strided((cache.shape[0], used), (cache.stride(0), 1))


def _positions(layout: CacheLayout, slots: Tensor, field: Field) -> tuple[Tensor, Tensor]:
    block, offset = split_slots(slots, layout.page)
    within = field.base + offset.unsqueeze(-1) * field.stride + torch.arange(field.width, device=slots.device)
    return block.unsqueeze(-1), within


def _scatter(layout: CacheLayout, cache: Tensor, slots: Tensor, fields: tuple[tuple[Field, Tensor], ...]) -> None:
    pages = as_pages(layout, cache)
    keep = last_of_each(slots, valid_slots(slots, tokens_of(layout, cache)))
    for field, values in fields:
        rows = values.contiguous().view(torch.uint8)
        if rows.shape != (*slots.shape, field.width):
            raise InputError(
                "values", f"{list(rows.shape)} bytes", f"{[*slots.shape, field.width]} for {list(slots.shape)} slots"
            )
        pages[_positions(layout, slots.flatten()[keep], field)] = rows.flatten(0, -2)[keep]


def last_of_each(slots: Tensor, valid: Tensor) -> Tensor:
    """The places, in the flat list of slots, of the last row of each valid slot."""
    places = valid.flatten().nonzero()[:, 0]
    ordered, order = slots.flatten()[places].sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return places[order[last]]


def _gather(layout: CacheLayout, cache: Tensor, slots: Tensor, field: Field) -> Tensor:
    return as_pages(layout, cache)[_positions(layout, slots, field)]
