"""The latent KV caches by name: those with channels of their own, and those that hold any: FP8 rows, and rows as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SpecError, UnknownName
from .caches import (
    CacheLayout,
    Field,
    IndexKLayout,
    KvLayout,
    KvV4Layout,
    KvV32Layout,
    last_of_each,
    split_slots,
    tokens_of,
    valid_slots,
)
from .channels import MOST, MOST_TAIL, STEP
from .quantization import e8m0_decode, e8m0_encode

ROW_SCALES: dict[str, tuple[str, int]] = {
    **{f"fp8_fp32_{group}": ("fp32", group) for group in (32, 64, 128)},
    "fp8_fp32_token": ("fp32", 0),
    **{f"fp8_ue8m0_{group}": ("e8m0", group) for group in (32, 64, 128)},
    "fp8_ue8m0_token": ("e8m0", 0),
    "fp8_tensor": ("none", 0),
}
"""For each layout of ``KvRowsLayout``: how scales are stored, and channels that share one (0: all of a token)."""
_BYTES = {"fp32": 4, "e8m0": 1, "none": 0}  # of a scale


@dataclass(frozen=True)
class KvRowsLayout(KvLayout):
    """Latent KV of any channels, token by token: d_nope e4m3, their scales (padded to 16 bytes), d_rope bf16.

    The name says how scales are kept: "fp8_fp32_128" one in fp32 per 128 channels, "fp8_ue8m0_32" a power of two per 32,
    "fp8_fp32_token" one per token, "fp8_tensor" none: the whole cache shares one that the caller keeps. "v32" is "fp8_fp32_128"
    of 512 + 64 channels; 512 channels in "fp8_ue8m0_32" take 528 bytes.
    """

    name: str = "fp8_fp32_128"
    d_nope: int = 512
    d_rope: int = 64
    d_v: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kv_channels(self.name, self.d_nope, self.d_rope)

    @property
    def stored_scales(self) -> str:
        return ROW_SCALES[self.name][0]

    @property
    def group(self) -> int:
        return ROW_SCALES[self.name][1] or self.d_nope

    @property
    def bytes_per_token(self) -> int:
        return self.rope.base + self.rope.width

    @property
    def nope(self) -> Field:
        return Field(0, self._stride, self.d_nope)

    @property
    def scales(self) -> Field:
        return Field(self.d_nope, self._stride, _BYTES[self.stored_scales] * self.groups)

    @property
    def rope(self) -> Field:
        return Field(self._rope_base, self._stride, 2 * self.d_rope)

    @property
    def _rope_base(self) -> int:
        return self.d_nope + -(-_BYTES[self.stored_scales] * self.groups // 16) * 16

    @property
    def _stride(self) -> int:
        return self._rope_base + 2 * self.d_rope

    def encode(self, scales: Tensor) -> Tensor:
        if self.stored_scales == "none":
            return scales[..., :0].to(torch.uint8)
        if self.stored_scales == "fp32":
            return scales.float()
        return scales if scales.dtype == torch.uint8 else e8m0_encode(scales)

    def decode(self, stored: Tensor) -> Tensor:
        if self.stored_scales == "none":
            return torch.ones(*stored.shape[:-1], 1, dtype=torch.float32, device=stored.device)
        return stored.view(torch.float32) if self.stored_scales == "fp32" else e8m0_decode(stored)


@dataclass(frozen=True)
class KvV41Layout(KvLayout):
    """Latent KV "v4.1", 528 B per token, planar inside a page padded to a multiple of 512 B (vLLM, #56893).

    page × 512 e4m3, the rotary channels among them, then page × 16 e8m0 scales, one per 32 channels. All are the value; rotary
    position is applied before they are stored.
    """

    name: ClassVar[str] = "v41"
    stored_scales: ClassVar[str] = "e8m0"
    d_nope: ClassVar[int] = 512
    d_rope: ClassVar[int] = 0
    d_v: ClassVar[int] = 512
    group: ClassVar[int] = 32
    bytes_per_token: ClassVar[int] = 528

    @property
    def page_bytes(self) -> int:
        return -(-self.page * self.bytes_per_token // self.d_nope) * self.d_nope

    @property
    def shape_per_block(self) -> tuple[int, ...]:
        return (self.page_bytes,)

    @property
    def nope(self) -> Field:
        return Field(0, self.d_nope, self.d_nope)

    @property
    def scales(self) -> Field:
        return Field(self.page * self.d_nope, self.groups, self.groups)

    @property
    def rope(self) -> Field:
        return Field(0, 0, 0)

    def encode(self, scales: Tensor) -> Tensor:
        return scales if scales.dtype == torch.uint8 else e8m0_encode(scales)

    def decode(self, stored: Tensor) -> Tensor:
        return e8m0_decode(stored)


@dataclass(frozen=True)
class KvPlainLayout(CacheLayout):
    """Latent KV as it is, "bf16": bf16 [blocks, page, 1, d_nope + d_rope]; the first ``d_v`` channels are the value."""

    d_nope: int = 512
    d_rope: int = 64
    d_v: int = 512
    name: ClassVar[str] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kv_channels(self.name, self.d_nope, self.d_rope)

    @property
    def width(self) -> int:
        return self.d_nope + self.d_rope

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.width

    def empty(self, blocks: int, device: torch.device | str = "cpu") -> Tensor:
        """A cache of zeros, bf16 [blocks, page, 1, d_nope + d_rope]."""
        return torch.zeros(blocks, self.page, 1, self.width, dtype=torch.bfloat16, device=device)

    def store(self, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Write bf16 ``rows`` [n, d_nope + d_rope] to their ``slots`` [n]; of rows with one slot the last, invalid ones not."""
        stored = last_of_each(slots, valid_slots(slots, tokens_of(self, cache)))
        block, offset = split_slots(slots[stored], self.page)
        cache[block, offset, 0] = rows[stored]

    def dequantize(self, cache: Tensor, slots: Tensor, scale: float = 1.0) -> Tensor:
        """fp32 latent [..., d_nope + d_rope] of valid ``slots`` [...]."""
        block, offset = split_slots(slots, self.page)
        return cache[block, offset, 0].float()


AnyKvLayout = KvLayout | KvPlainLayout
Layout = IndexKLayout | AnyKvLayout
KV_LAYOUTS = (KvV32Layout.name, KvV4Layout.name, KvV41Layout.name, KvPlainLayout.name, *ROW_SCALES)


def kv_layout(name: str, page: int = 64, d_nope: int = 512, d_rope: int = 64, d_v: int = 512) -> AnyKvLayout:
    """The KV layout called ``name``; "v32", "v4" and "v41" have channels of their own.

    Raises:
        UnknownName: there is no layout of that name.
        SpecError: it cannot hold such channels.
    """
    if name == KvV32Layout.name:
        return KvV32Layout(page)
    if name == KvV4Layout.name:
        return KvV4Layout(page)
    if name == KvV41Layout.name:
        return KvV41Layout(page)
    if name == KvPlainLayout.name:
        return KvPlainLayout(page, d_nope, d_rope, d_v)
    if name not in ROW_SCALES:
        raise UnknownName("KV cache layout", name, KV_LAYOUTS)
    return KvRowsLayout(page, name, d_nope, d_rope, d_v)


def require_kv_channels(name: str, d_nope: int, d_rope: int) -> None:
    """Raise SpecError unless a cache of this layout can hold so many channels."""
    for field, came, layout in (("d_nope", d_nope, "d_nope"), ("d_rope", d_rope, "d_rope")):
        for known in (KvV32Layout, KvV4Layout, KvV41Layout):
            if name == known.name and came != getattr(known, layout):
                raise SpecError(field, came, f"{getattr(known, layout)} with kv_layout: {name}")
    step = ROW_SCALES[name][1] if name in ROW_SCALES else 0
    if not STEP <= d_nope <= MOST + MOST_TAIL or d_nope % (step or STEP):
        raise SpecError("d_nope", d_nope, f"{step or STEP} to {MOST} in steps of {step or STEP} with kv_layout: {name}")
    if not 0 <= d_rope <= MOST_TAIL or d_rope % STEP:
        raise SpecError("d_rope", d_rope, f"0 to {MOST_TAIL} in steps of {STEP}")
