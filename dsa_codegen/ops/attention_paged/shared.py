"""What the backends of paged attention share: splits of a row, pools as kernels take them, where a token's fields lie."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.checks import pieces, step
from ...problem.kv_layouts import AnyKvLayout, KvPlainLayout
from ...problem.op import Inputs
from ...problem.paged import divider
from ...problem.values import Scalar
from .problem import AttentionPagedSpec

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Into how many parts a row may be cut."""
TILE = 64
"""Entries of a step where tensor cores take whole tiles: what one warpgroup instruction takes."""
PARTIAL_BYTES = 1 << 30
"""Of the parts that splits leave, at most."""
COMBINE_D, COMBINE_S = 128, 16
"""Channels and parts of a step of ``combine``: all its loads are in flight at once."""
_INVARIANT_TILES = 8  # of a part, where all rows are split alike


def most_splits(spec: AttentionPagedSpec, rows: int) -> int:
    """Records are tuned for few queries per sequence; a prompt's thousands would make the parts take tens of GB."""
    return max(1, PARTIAL_BYTES // (4 * spec.layout.d_v * rows * spec.heads))


def rows_of_turn(spec: AttentionPagedSpec, splits: int) -> int:
    """Rows whose parts fit together, where each is cut into so many."""
    return PARTIAL_BYTES // (4 * spec.layout.d_v * spec.heads * splits)


def partials(spec: AttentionPagedSpec, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where so many parts of a row and head leave their outputs and denominators."""
    out = torch.empty(parts, spec.layout.d_v, dtype=torch.float32, device=device)
    return out, torch.empty(parts, dtype=torch.float32, device=device)


def arguments(
    spec: AttentionPagedSpec, inputs: Inputs, tensors: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(tensors, whole numbers) as every kernel of attention takes them, one pool behind the other.

    Args:
        tensors: queries, the sink where there is one, and what is written.
    """
    q, sink, written = tensors
    (listed, places), *extra = _pools(spec, inputs)
    strides = (pieces(q, dimension) for dimension in range(3))
    given = (q, *listed, *sink, *(tensor for more, _ in extra for tensor in more), *written)
    return given, (*places, *(value for _, more in extra for value in more), q.shape[1], *strides)


def no_slots(spec: AttentionPagedSpec, inputs: Inputs) -> bool:
    """Whether no cache of a call has any."""
    return not any(slots for _, (slots, *_) in _pools(spec, inputs))


def _pools(spec: AttentionPagedSpec, inputs: Inputs) -> list[tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    first = _pool(inputs, spec.layout)
    return [first, _pool(inputs, spec.extra_layout, "extra_")] if spec.extra_topk else [first]


def _pool(inputs: Inputs, layout: AnyKvLayout, prefix: str = "") -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What a kernel takes of a pool: its tensors; its slots, pages and lists in numbers."""
    cache, indices, lengths = (inputs[f"{prefix}{name}"] for name in ("cache", "indices", "lengths"))
    rows_per_length = indices.shape[1] if lengths is not None and lengths.dim() == 1 else 1
    tensors = (cache, indices) if lengths is None else (cache, indices, lengths)
    scales_base = 0 if isinstance(layout, KvPlainLayout) else layout.scales.base
    page = (layout.page, *divider(layout.page), scales_base)
    listed = (indices.shape[2], step(indices, 0), step(indices, 1), rows_per_length)
    return tensors, (len(cache) * layout.page, cache.stride(0), *page, *listed)


def fixed_splits(spec: AttentionPagedSpec) -> int:
    """Of a batch-invariant row: parts of eight tiles, the compromise between a single row and many."""
    tiles = -(-(spec.topk + spec.extra_topk) // TILE)
    return max(splits for splits in SPLITS if splits <= max(1, tiles // _INVARIANT_TILES))


def places_of(layout: AnyKvLayout) -> dict[str, Scalar]:
    """Where the fields of a token lie in its page: in bytes, or in bf16 channels of rows as they are."""
    if isinstance(layout, KvPlainLayout):
        whole = layout.width
        return {
            **{"group": layout.d_nope, "power_of_two": False, "nope_base": 0, "rope_base": layout.d_nope},
            **{"token_stride": whole, "scales_stride": 0},
        }
    return {
        "group": layout.group,
        "power_of_two": layout.stored_scales == "e8m0",
        "nope_base": layout.nope.base,
        "rope_base": layout.rope.base,
        "token_stride": layout.nope.stride,
        "scales_stride": layout.scales.stride,
    }


def apart(spec: AttentionPagedSpec) -> bool:
    """Whether scales lie elsewhere than in their token's row as "v32" has it."""
    return spec.kv_layout != "v32"


def scale_bytes(spec: AttentionPagedSpec) -> int:
    """Of 256 channels of a token: four powers of two in "v4", eight of 32 channels each or two fp32 elsewhere."""
    return 4 if spec.kv_layout == "v4" else 8
