"""What the operations on paged caches share: layouts by name, the fields a template needs, checks of cache and slots."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import checks
from .caches import Field, IndexKLayout, KvV4Layout, KvV32Layout
from .channels import INDEX_WIDTHS, MOST, MOST_TAIL, STEP
from .draw import Draw
from .kv_layouts import KV_LAYOUTS, ROW_SCALES, KvPlainLayout, KvV41Layout, Layout, kv_layout
from .presets import PRECISIONS
from .values import Scalar, next_power_of_two

LAYOUTS = ("index_k", *KV_LAYOUTS)
WIDTHS: dict[str, tuple[int, ...]] = {
    "index_k": INDEX_WIDTHS,
    "v32": (KvV32Layout.d_nope,),
    "v4": (KvV4Layout.d_nope,),
    "v41": (KvV41Layout.d_nope,),
    **{name: tuple(range(group or STEP, MOST + 1, group or STEP)) for name, (_, group) in ROW_SCALES.items()},
    "bf16": tuple(range(STEP, MOST + MOST_TAIL + 1, STEP)),
}
"""For each layout, how many channels of a token may be quantised; of rows as they are, how many there are without position."""
ROPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(LAYOUTS, tuple(range(0, MOST_TAIL + 1, STEP))),
    "v32": (64,),
    "v4": (64,),
    "v41": (0,),
}
"""For each layout, how many channels behind them stay bf16; no matter for index keys, which have none."""
FIXED = ("v32", "v4")
"""Layouts with channels of their own, for which every template is made."""
D_ROPE = 64
"""Of them, unless a spec says otherwise."""
SLOTS = {"i32": torch.int32, "i64": torch.int64}
SLOT_NAMES = {dtype: name for name, dtype in SLOTS.items()}

_ALIGNMENT = 16  # bytes; kernels move 16 at a time
_FLAT_PAGES = tuple(1 << power for power in range(11))


def layout_of(name: str, page: int, width: int, d_rope: int = D_ROPE) -> Layout:
    """The layout of that name; ``width`` is head_dim of the index keys, d_nope of a KV cache."""
    if name == "index_k":
        return IndexKLayout(page, width)
    return kv_layout(name, page, width, d_rope)


def group_of(layout: Layout) -> int:
    """Channels that share a scale."""
    if isinstance(layout, IndexKLayout):
        return layout.head_dim
    return width_of(layout) if isinstance(layout, KvPlainLayout) else layout.group


def width_of(layout: Layout) -> int:
    """Channels that are quantised, or stored in front of the rotary ones."""
    return layout.head_dim if isinstance(layout, IndexKLayout) else layout.d_nope


def scales_of(layout: Layout) -> str:
    """How scales are stored: "fp32", "e8m0", "tensor" (one of the whole cache, which the caller keeps), or "none"."""
    if isinstance(layout, IndexKLayout):
        return "fp32"
    if isinstance(layout, KvPlainLayout):
        return "none"
    return "tensor" if layout.stored_scales == "none" else layout.stored_scales


def rope_of(layout: Layout) -> int:
    """Channels behind the quantised ones that stay bf16."""
    return 0 if isinstance(layout, IndexKLayout) else layout.d_rope


def pack(layout: Layout, cache: Tensor, slots: Tensor, values: Tensor, scales: Tensor, rope: Tensor | None) -> None:
    """Write quantised rows (e4m3 [tokens, width], fp32 scales [tokens, groups]) and their rope, if any, to their slots."""
    if isinstance(layout, IndexKLayout):
        layout.pack(cache, slots, values, scales[:, 0])
    else:
        assert not isinstance(layout, KvPlainLayout)
        rope = values.new_empty(len(values), 0, dtype=torch.bfloat16) if rope is None else rope
        layout.pack(cache, slots, values, scales, rope)


def template_names(layout: Layout, width: int) -> dict[str, Scalar]:
    """What a template must know of a layout: groups, and base and stride of every field."""
    shared = group_of(layout)
    group = tile_of(shared)
    groups = width // group
    names: dict[str, Scalar] = {
        "group": group,
        "groups": groups,
        "groups_padded": next_power_of_two(groups),
        "shared": shared // group,
        "d_rope": rope_of(layout),
        "rope_padded": next_power_of_two(max(rope_of(layout), 1)),
        "scales": scales_of(layout),
    }
    if isinstance(layout, IndexKLayout):
        fields = {"values": layout.keys, "scales": layout.scale}
    elif isinstance(layout, KvPlainLayout):
        stride = layout.bytes_per_token
        fields = {"values": Field(0, stride, 2 * width), "scales": Field(0, 0, 0), "rope": Field(2 * width, stride, 0)}
    else:
        fields = {"values": layout.nope, "scales": layout.scales, "rope": layout.rope}
    for name, field in fields.items():
        names |= {f"{name}_base": field.base, f"{name}_stride": field.stride}
    return names


def tile_of(shared: int) -> int:
    """Channels of a group in a kernel's tile, a power of two: those that share a scale, or as many of them as divide them."""
    return shared & -shared


def divider(page: int) -> tuple[int, int]:
    """(factor, shift) with ``slot // page == slot * factor >> shift`` for 0 <= slot < 2^31: a kernel's way to divide by a page.

    A factor of 2^(31 + bits) / page, rounded up, errs by less than ``page <= 2^bits``, the product by less than one place
    (Granlund and Montgomery, 1994).
    """
    shift = 31 + (page - 1).bit_length()
    return -(-(1 << shift) // page), shift


def check_cache(name: str, value: object, bytes_per_token: int, like: Tensor | None = None) -> int:
    """Check a cache, uint8 [blocks, page, 1, bytes_per_token] or [blocks, bytes of a page], and return its page size.

    Blocks may lie further apart than they are long (padded pages, caches of several layers interleaved). The two-dimensional
    form has to have exactly the length of a page of 1, 2, 4, … 1024 tokens: padding is never taken for tokens.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    flat = isinstance(value, Tensor) and value.dim() == 2
    shape = (None, None) if flat else (None, None, 1, bytes_per_token)
    cache = checks.tensor(name, value, shape, torch.uint8, like=like, inner_contiguous=True)
    blocks, page = cache.shape[0], _flat_page(name, cache, int(bytes_per_token)) if flat else cache.shape[1]
    if blocks and not flat and page > 1 and cache.stride(1) != bytes_per_token:
        raise InputError(name, f"strides {cache.stride()}", f"contiguous pages (stride {bytes_per_token} between tokens)")
    if blocks > 1 and (cache.stride(0) % _ALIGNMENT or cache.stride(0) < page * bytes_per_token):
        allowed = f"a multiple of {_ALIGNMENT} of at least {page * bytes_per_token}"
        raise InputError(name, f"{cache.stride(0)} bytes between blocks", allowed)
    return page


def check_keys(q: Any, cache: Any, scores: Any) -> tuple[Tensor, int]:
    """Check an indexer's queries [batch, next_n, heads, head_dim] and the paged cache of its keys, in one of ``PRECISIONS``.

    Returns:
        the queries, with rows that are read as they lie, and the tokens of a page.
    """
    checks.one_of("scores", scores, PRECISIONS)
    quantised = scores == "fp8"
    q = checks.rows("q", q, (None, None, None, None), checks.FP8 if quantised else checks.floating(q))
    return q, check_cache("cache", cache, q.shape[3] + 4, like=q) if quantised else check_plain_cache("cache", cache, q)


def check_plain_cache(name: str, value: object, q: Tensor) -> int:
    """Check a cache of unquantised keys [blocks, page, 1, head_dim] of the dtype of ``q``, and return its page size.

    Blocks may lie further apart than they are long, by a multiple of 16 elements.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    return check_plain_rows(name, value, q.shape[-1], q.dtype, q)


def check_plain_rows(name: str, value: object, head_dim: int | None, dtype: torch.dtype, like: Tensor | None = None) -> int:
    """The same of a cache whose rows have ``head_dim`` channels, any number where it is None, of this dtype."""
    cache = checks.tensor(name, value, (None, None, 1, head_dim), dtype, like=like, inner_contiguous=True)
    head_dim = cache.shape[3]
    page = cache.shape[1]
    if cache.shape[0] and page > 1 and cache.stride(1) != head_dim:
        raise InputError(name, f"strides {cache.stride()}", f"contiguous pages (stride {head_dim} between tokens)")
    if cache.shape[0] > 1 and (cache.stride(0) % _ALIGNMENT or cache.stride(0) < page * head_dim):
        allowed = f"a multiple of {_ALIGNMENT} of at least {page * head_dim}"
        raise InputError(name, f"{cache.stride(0)} elements between blocks", allowed)
    return page


def _flat_page(name: str, cache: Tensor, bytes_per_token: int) -> int:
    """The page size of a cache [blocks, bytes of a page]."""
    page = _page_by_bytes(bytes_per_token).get(int(cache.shape[1]))
    if page is None:
        padded = " (or the next multiple of 576)" if bytes_per_token == KvV4Layout.bytes_per_token else ""
        raise InputError(
            name,
            f"blocks of {cache.shape[1]} bytes",
            f"page · {bytes_per_token} bytes{padded} with a page of 1, 2, 4, … or {_FLAT_PAGES[-1]} tokens; of another page, "
            f"or with other padding, pass {name}[:, :page * {bytes_per_token}].unflatten(1, (page, 1, {bytes_per_token}))",
        )
    return page


@functools.cache
def _page_by_bytes(bytes_per_token: int) -> dict[int, int]:
    """Bytes of a block -> tokens of its page. Were every page allowed, 64 tokens with padding would be read as 65."""
    sizes = {page * bytes_per_token: page for page in _FLAT_PAGES}
    if bytes_per_token == KvV4Layout.bytes_per_token:
        sizes |= {KvV4Layout(page).page_bytes: page for page in _FLAT_PAGES}
    if bytes_per_token == KvV41Layout.bytes_per_token:
        sizes |= {KvV41Layout(page).page_bytes: page for page in _FLAT_PAGES}
    return sizes


def check_scale(layout: Layout, scale: float) -> dict[str, float]:
    """The scale that a whole cache shares, as an input of an operation; nothing for layouts that store theirs.

    Raises:
        InputError: it is not positive, or came for a layout that stores its own.
    """
    if scales_of(layout) == "tensor":
        if not 0 < scale < math.inf:
            raise InputError("scale", scale, "a positive number")
        return {"scale": scale}
    if scale != 1.0:
        raise InputError("scale", scale, "1.0: only caches of layout 'fp8_tensor' share one")
    return {}


def roundings(layout: Layout) -> tuple[bool, ...]:
    """Whether scales may be rounded up to powers of two: always where they are stored as such, never where there are none."""
    return {"e8m0": (True,), "fp32": (False, True)}.get(scales_of(layout), (False,))


def widths(layout: str) -> str:
    """The channels that a layout may have, in words."""
    known = WIDTHS[layout]
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]} in steps of {known[1] - known[0]}"


def untouched(cache: Tensor) -> Tensor:
    """A cache as it was: one byte, or number, everywhere; its last block is named by no slot."""
    bits = cache.contiguous().view(torch.int16 if cache.dtype == torch.bfloat16 else torch.uint8)
    return torch.full_like(bits, int(bits[-1].flatten()[-1])).view(cache.dtype)


def check_slots(slots: object, tokens: int | None, like: Tensor) -> Tensor:
    """Check slots [tokens], int32 or int64."""
    return checks.tensor("slots", slots, (tokens,), tuple(SLOTS.values()), like=like)


def draw_slots(draw: Draw, tokens: int, blocks: int, page: int, dtype: str, repeated: bool = False) -> Tensor:
    """Random slots [tokens] of the first ``blocks - 1`` blocks, distinct or not, some of them invalid, at random places."""
    slots = draw.permutation((blocks - 1) * page)[:tokens]
    if repeated:
        slots = slots[draw.integers(0, tokens // 3 + 1, tokens, dtype=torch.int64)]
    slots = slots.masked_fill(draw.uniform(tokens) < 0.1, -1)
    return slots.masked_fill(draw.uniform(tokens) < 0.05, blocks * page).to(SLOTS[dtype])
